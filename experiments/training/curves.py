"""Loss curves of runs, from their `steps.jsonl`: do they agree?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.training.step_log import read_records

LOG = "steps.jsonl"
LAST = 50  # the table's means are over the last 50 steps that all runs have

Losses = dict[str, dict[int, float]]  # by name, then by step


def draw_losses(runs: list[Path], out: Path) -> str:
    """Write `losses.png` and `losses.md` into `out`.

    The picture has a panel for each loss and a line for each run, and below them the differences to the first run. The
    table also lists the settings that differ although losses depend on them.

    Args:
        runs: folders of runs, with different names.
        out: a folder.

    Returns:
        The table.

    Raises:
        ValueError: if a run has no steps, no step is common to all runs, or two folders have the same name.
    """
    found = {run.name: _losses(run) for run in runs}
    if len(found) < len(runs):
        raise ValueError("the folders of runs must have different names, got two of the same name")
    out.mkdir(parents=True, exist_ok=True)
    _draw(found, out / "losses.png")
    table = _table(found) + _different_settings(runs)
    (out / "losses.md").write_text(table)
    return table


def _losses(run: Path) -> Losses:
    if not (run / LOG).exists() or not (records := read_records(run / LOG)):
        raise ValueError(f"{run} holds no {LOG} with steps of a run")
    losses: Losses = {"LM": {record["step"]: _number(record["lm_loss"]) for record in records}}
    for depth in range(len(records[0]["mtp_losses"])):
        losses[f"MTP depth {depth + 1}"] = {
            record["step"]: _number(record["mtp_losses"][depth]) for record in records
        }
    if records[0]["aux_loss"] is not None:
        losses["load balancing"] = {record["step"]: record["aux_loss"] for record in records}
    return losses


def _number(loss: float | None) -> float:
    """Return NaN if no token counted, for matplotlib and numpy."""
    return float("nan") if loss is None else loss


def _different_settings(runs: list[Path]) -> str:
    """List what differs among the runs' models, training, data and devices."""
    records = {
        run.name: json.loads((run / "run.json").read_text()) for run in runs if (run / "run.json").exists()
    }
    values = {run: {**one["identity"], "device": one["where"]["device"]} for run, one in records.items()}
    lines = []
    for name in dict.fromkeys(name for one in values.values() for name in one):
        of_runs = {run: one[name] for run, one in values.items() if name in one}
        if len({str(value) for value in of_runs.values()}) > 1:
            lines.append(f"- {name}: {', '.join(f'{value} in `{run}`' for run, value in of_runs.items())}")
    return "\n".join(["", "The settings of these runs differ:", "", *lines, ""]) if lines else ""


def _draw(found: dict[str, Losses], path: Path) -> None:
    from matplotlib import pyplot as plt  # imported here because it takes half a second

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
            # The first is a broad line, so that it stays visible below a line that coincides with it.
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
    """Return the steps that both have, and the differences."""
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
            difference = "" if run == name else f" ({'0, every bit' if largest == 0 else f'{largest:.2g}'})"
            mean = np.mean([losses[panel][step] for step in last])
            cells.append("-" if np.isnan(mean) else f"{mean:.4f}{difference}")
        short = f" ({steps[run]} steps)" if steps[run] < max(steps.values()) else ""
        lines.append(f"| `{run}`{short} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
