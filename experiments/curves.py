"""Loss curves of runs, from their `steps.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from overlap_mtp.metrics import read_records

LOG = "steps.jsonl"


def draw_losses(runs: list[Path], out: Path) -> Path:
    """A panel for each loss, a line for each run; the picture's path. Raises ValueError where a run has no steps."""
    records = {}
    for run in runs:
        if not (run / LOG).exists() or not (steps := read_records(run / LOG)):
            raise ValueError(f"{run} holds no {LOG} with steps of a run")
        records[run.name] = steps
    panels = list(dict.fromkeys(name for steps in records.values() for name in _losses(steps[0])))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for number, (name, steps) in enumerate(records.items()):
            points = [
                (record["step"], _losses(record)[panel]) for record in steps if panel in _losses(record)
            ]
            # The first is a broad line below the others, which would hide it where they coincide.
            style: dict[str, Any] = {"linewidth": 4, "alpha": 0.35} if number == 0 else {"linewidth": 1}
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    grid[0][0].set_ylabel("loss")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "losses.png", dpi=130)
    plt.close(figure)
    return out / "losses.png"


def _losses(record: dict[str, Any]) -> dict[str, float]:
    losses = {"LM": record["lm_loss"]}
    losses |= {f"MTP depth {depth}": loss for depth, loss in enumerate(record["mtp_losses"], start=1)}
    return losses | ({} if record["aux_loss"] is None else {"load balancing": record["aux_loss"]})
