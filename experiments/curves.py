"""Loss curves of runs, from their `steps.jsonl`: do they coincide?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.metrics import read_records

LOG = "steps.jsonl"
COMMON = ("seq_len", "num_documents", "token_dtype", "seed")  # of a run's settings, besides model and recipe
LAST = 50  # steps that the table's means are over, of those that all runs have

Losses = dict[str, dict[int, float]]  # by name, then by step


def draw_losses(runs: list[Path], out: Path) -> str:
    """Writes `losses.png` and `losses.md` into `out`; the table. Raises ValueError where a run has no steps.

    A panel for each loss, a line for each run; where there are several, how far each is from the first below. The
    table says where they were not to be alike.
    """
    found = {run.name: _losses(run) for run in runs}
    if len(found) < len(runs):
        raise ValueError("runs are told apart by the names of their folders: two are alike")
    out.mkdir(parents=True, exist_ok=True)
    _draw(found, out / "losses.png")
    table = _table(found) + _unlike(runs)
    (out / "losses.md").write_text(table)
    return table


def _losses(run: Path) -> Losses:
    if not (run / LOG).exists() or not (records := read_records(run / LOG)):
        raise ValueError(f"{run} holds no {LOG} with steps of a run")
    losses: Losses = {"LM": {record["step"]: record["lm_loss"] for record in records}}
    for depth in range(len(records[0]["mtp_losses"])):
        losses[f"MTP depth {depth + 1}"] = {record["step"]: record["mtp_losses"][depth] for record in records}
    if records[0]["aux_loss"] is not None:
        losses["load balancing"] = {record["step"]: record["aux_loss"] for record in records}
    return losses


def _unlike(runs: list[Path]) -> str:
    """The settings that losses depend on and that are not those of all runs."""
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        if (run / "run.json").exists():
            settings = json.loads((run / "run.json").read_text())["settings"]
            sizes, recipe = settings["sizes"], settings["recipe"]
            of_run = {**settings["model"], **recipe, **{name: settings[name] for name in COMMON}}
            of_run["dp * accumulate"] = sizes["dp"] * of_run.pop("accumulate")
            for name, value in of_run.items():
                values.setdefault(name, {})[run.name] = value
    lines = [
        f"- {name}: {', '.join(f'{value} in `{run}`' for run, value in of_runs.items())}"
        for name, of_runs in values.items()
        if len({str(value) for value in of_runs.values()}) > 1
    ]
    return "\n".join(["", "These runs are not of one kind:", "", *lines, ""]) if lines else ""


def _draw(found: dict[str, Losses], path: Path) -> None:
    from matplotlib import pyplot as plt  # here: ranks that draw nothing start half a second sooner

    panels = list(dict.fromkeys(panel for losses in found.values() for panel in losses))
    rows = 1 + (len(found) > 1)
    figure, grid = plt.subplots(
        rows,
        len(panels),
        figsize=(4 * len(panels), 3 * rows),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    first = next(iter(found.values()))
    for column, panel in enumerate(panels):
        for number, (name, losses) in enumerate(found.items()):
            if panel not in losses:
                continue
            steps, values = list(losses[panel]), list(losses[panel].values())
            # The first is a broad line below the others, which would hide it where they coincide.
            style: dict[str, Any] = {"linewidth": 4, "alpha": 0.35} if number == 0 else {"linewidth": 1}
            grid[0][column].plot(steps, values, label=name, **style)
            if number and panel in first:
                both, difference = _differences(losses[panel], first[panel])
                grid[1][column].plot(both, difference, linewidth=0.8, color=f"C{number}")
        grid[0][column].set_title(panel, fontsize=9)
        grid[-1][column].set_xlabel("step")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    grid[0][0].set_ylabel("loss")
    if rows > 1:
        grid[1][0].set_ylabel(f"difference to {next(iter(found))}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _differences(losses: dict[int, float], others: dict[int, float]) -> tuple[list[int], list[float]]:
    """Of the steps that both have."""
    both = [step for step in losses if step in others]
    return both, [losses[step] - others[step] for step in both]


def _table(found: dict[str, Losses]) -> str:
    name, first = next(iter(found.items()))
    steps = {run: len(losses["LM"]) for run, losses in found.items()}
    common = sorted(set.intersection(*(set(losses["LM"]) for losses in found.values())))
    if not common:
        raise ValueError("the runs have no step in common")
    last = common[-LAST:]
    lines = [
        f"Means of steps {last[0]} to {last[-1]}, and in brackets the largest difference of a step to `{name}`:",
        "",
        f"| run | {' | '.join(first)} |",
        "|---|" + "---|" * len(first),
    ]
    for run, losses in found.items():
        cells = []
        for panel, reference in first.items():
            if panel not in losses:
                cells.append("")
                continue
            largest = max(map(abs, _differences(losses[panel], reference)[1]), default=float("nan"))
            said = "" if run == name else f" ({'0, every bit' if largest == 0 else f'{largest:.2g}'})"
            cells.append(f"{np.mean([losses[panel][step] for step in last]):.4f}{said}")
        short = f" ({steps[run]} steps)" if steps[run] < max(steps.values()) else ""
        lines.append(f"| `{run}`{short} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
