"""What a comparison looks like: step time by schedule, and what the exchange adds to a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "sync": "#b3402a",
    "merged": "#d98b3a",
    "overlap": "#4f8a8b",
    "prefetch": "#1f5f8b",
    "prepared": "#7a7a7a",
    "none": "#c4c4c4",
}


def colour_of(mode: str) -> str:
    """The schedule's colour, whatever the transport."""
    return COLOURS.get(mode.partition(":")[0], "#555555")


def draw(result: dict[str, Any], out: Path, name: str = "") -> list[Path]:
    """Writes `step_time.png` and `exposed.png` (prefixed with `name`) into `out`."""
    rows, where = result["rows"], result["where"]
    modes = list(rows)
    colours = [colour_of(mode) for mode in modes]
    title = caption(result)

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    medians = [rows[mode]["median_ms"] for mode in modes]
    spread = [
        [rows[mode]["median_ms"] - rows[mode]["p10_ms"] for mode in modes],
        [rows[mode]["p90_ms"] - rows[mode]["median_ms"] for mode in modes],
    ]
    bars = axes.bar(modes, medians, color=colours, yerr=spread, capsize=4, error_kw={"linewidth": 1})
    labels = [f"{rows[mode]['ratio']['value']:.3f} x" for mode in modes]
    axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
    _name_bars(axes, modes)
    axes.set_ylabel("step time (ms), median and p10 to p90")
    axes.set_title(title, fontsize=9)
    paths = [_save(figure, out / f"{name}step_time.png")]

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    shown = [mode for mode in modes if mode != "prepared"]
    values = [rows[mode]["step_delta_us"]["value"] for mode in shown]
    interval = [
        [rows[mode]["step_delta_us"]["value"] - rows[mode]["step_delta_us"]["low"] for mode in shown],
        [rows[mode]["step_delta_us"]["high"] - rows[mode]["step_delta_us"]["value"] for mode in shown],
    ]
    bars = axes.bar(shown, values, color=[colour_of(mode) for mode in shown], yerr=interval, capsize=4)
    axes.bar_label(bars, [f"{value:,.0f} µs" for value in values], padding=4, fontsize=9)
    _name_bars(axes, shown)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_ylabel("added to a `prepared` step (µs), 95 % interval")
    axes.set_title(f"{title}, {where['date']}", fontsize=9)
    return [*paths, _save(figure, out / f"{name}exposed.png")]


def _name_bars(axes: Any, modes: list[str]) -> None:
    axes.set_xticks(range(len(modes)), [mode.replace(":", "\n") for mode in modes], fontsize=8)


def caption(result: dict[str, Any]) -> str:
    """One line that says what was run on what."""
    settings, where = result["settings"], result["where"]
    documents = settings["num_documents"]
    return (
        f"{where['ranks']} x {where['device']}, hidden {settings['model']['hidden_size']}, "
        f"{settings['seq_len'] // where['ranks']} tokens a rank, "
        f"{'dense' if documents is None else f'{documents} documents'}, "
        f"{'forward' if settings['forward_only'] else 'forward + backward'}"
    )


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
