"""Loss curves of runs, from their `steps.jsonl`: do they agree?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from harness.command import check_out
from harness.plots import subplots
from overlap_mtp.training.step_log import read_records

LOG = "steps.jsonl"
ACCEPTED = "accepted at depth"
SMOOTHED = 20  # steps that the line of a single run is a mean of; its steps are faint
LAST = 50  # the table's means are over the last 50 steps that all runs have

Losses = dict[str, dict[int, float]]  # and shares of drafts, by name, then by step


def draw_losses(runs: list[Path], out: Path) -> str:
    """Write `losses.png` and `losses.md` into `out`.

    The picture has a panel for each loss and for the acceptance of each depth, and a line for each run; below them are
    the differences to the first run. The table also lists the settings that differ although losses depend on them.

    Args:
        runs: folders of runs, with different names.
        out: a folder.

    Returns:
        The table.

    Raises:
        ValueError: if a run has no steps, no step is common to all runs, two folders have the same name, or `out`
            cannot be one.
    """
    found = {run.name: _losses(run) for run in runs}
    if len(found) < len(runs):
        raise ValueError("the folders of runs must have different names, got two of the same name")
    check_out(out, "losses.png", "losses.md")
    _draw(found, out / "losses.png")
    table = _table(found) + _different_settings(runs)
    (out / "losses.md").write_text(table)
    return table


def _losses(run: Path) -> Losses:
    if not (run / LOG).exists() or not (records := read_records(run / LOG)):
        raise ValueError(f"{run} holds no {LOG} with steps of a run")
    losses: Losses = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or {"step", "lm_loss", "mtp_losses", "aux_loss", "acceptance"} - {
            *record
        }:
            raise ValueError(f"{run / LOG}, record {number} is not one of a step")
        named = {"LM": record["lm_loss"]}
        named |= {f"MTP depth {depth}": loss for depth, loss in enumerate(record["mtp_losses"], start=1)}
        if record["aux_loss"] is not None:
            named["load balancing"] = record["aux_loss"]
        named |= {f"{ACCEPTED} {depth}": one for depth, one in enumerate(record["acceptance"], start=1)}
        for name, loss in named.items():  # None if no token counted
            losses.setdefault(name, {})[record["step"]] = np.nan if loss is None else loss
    return losses


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
    panels = list(dict.fromkeys(panel for losses in found.values() for panel in losses))
    panels.sort(key=lambda panel: panel.startswith(ACCEPTED))
    rows = 1 + (len(found) > 1)
    figure, grid = subplots(rows, len(panels), (4 * len(panels), 3 * rows), sharex=True)
    reference, first = next(iter(found.items()))
    for column, panel in enumerate(panels):
        if rows == 1:
            _draw_one(grid[0][column], first[panel], reference)
        for number, (name, losses) in enumerate(found.items() if rows > 1 else ()):
            mine = losses.get(panel, {})
            # The first is a broad line, so that it stays visible below a line that coincides with it.
            style: dict[str, Any] = {"linewidth": 4, "alpha": 0.35} if number == 0 else {"linewidth": 1}
            grid[0][column].plot(list(mine), list(mine.values()), label=name, **style)
            if number:
                difference = _differences(mine, first.get(panel, {}))
                grid[1][column].plot(
                    list(difference), list(difference.values()), linewidth=0.8, color=f"C{number}"
                )
        grid[0][column].set_title(panel, fontsize=9)
        if panel.startswith(ACCEPTED):
            grid[0][column].yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        grid[-1][column].set_xlabel("step")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    grid[0][0].set_ylabel("loss")
    if rows > 1:
        grid[1][0].set_ylabel(f"difference to {reference}")
    figure.savefig(path, dpi=110)


def _draw_one(axes: Any, losses: dict[int, float], name: str) -> None:
    """Draw a single run: a faint line for its steps, and a clear one for the mean of SMOOTHED of them."""
    steps, values = list(losses), np.array(list(losses.values()))
    smoothed = len(steps) > 2 * SMOOTHED
    axes.plot(steps, values, color="C0", linewidth=1, alpha=0.3 if smoothed else 1, label=name)
    if smoothed:
        windows = np.lib.stride_tricks.sliding_window_view(values, SMOOTHED)
        axes.plot(
            steps[SMOOTHED - 1 :],
            windows.mean(-1),
            color="C0",
            linewidth=1.5,
            label=f"mean of {SMOOTHED} steps",
        )


def _differences(losses: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    """Return the differences of the steps that both have: 0 if no token counted in either, inf if only in one."""
    found = {step: losses[step] - others[step] for step in losses if step in others}
    for step in [step for step, difference in found.items() if np.isnan(difference)]:
        found[step] = 0 if np.isnan(losses[step]) and np.isnan(others[step]) else np.inf
    return found


def _table(found: dict[str, Losses]) -> str:
    name, first = next(iter(found.items()))
    longest = max(len(losses["LM"]) for losses in found.values())
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
            mine = losses.get(panel, {})
            largest = max(map(abs, _differences(mine, reference).values()), default=np.nan)
            difference = "" if run == name else f" ({'0, every bit' if largest == 0 else f'{largest:.2g}'})"
            values = [mine.get(step, np.nan) for step in last]
            cells.append("-" if np.isnan(values).all() else f"{np.nanmean(values):.4f}{difference}")
        steps = len(losses["LM"])
        short = f" ({steps} steps)" if steps < longest else ""
        lines.append(f"| `{run}`{short} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
