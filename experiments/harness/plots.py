"""The pictures of a comparison: step time by schedule, and what the exchange adds to a step."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {
    "sync": "#b3402a",
    "merged": "#d98b3a",
    "batched": "#c9b23f",
    "overlap": "#4f8a8b",
    "prefetch": "#1f5f8b",
    "prepared": "#7a7a7a",
    "none": "#c4c4c4",
}


def colour_of(mode: str) -> str:
    """Return the colour of a schedule, over whatever transport it runs."""
    return COLOURS.get(mode.partition(":")[0], "#555555")


def draw(result: dict[str, Any], baseline: str, out: Path, name: str = "") -> list[Path]:
    """Draw the record of a comparison.

    Args:
        result: the record.
        baseline: the schedule without any exchange.
        out: an existing folder.
        name: a prefix of the files' names.

    Returns:
        The paths of `step_time.png` and `step_delta.png`.
    """
    rows = result["rows"]
    spread = {mode: (row["median_ms"], row["p10_ms"], row["p90_ms"]) for mode, row in rows.items()}
    ratios = [f"{row['ratio']['value']:.3f} x" for row in rows.values()]
    deltas = {
        mode: tuple(row["step_delta_us"][part] for part in ("value", "low", "high"))
        for mode, row in rows.items()
        if mode != baseline
    }
    title = f"{textwrap.fill(caption(result), 95)}\n{result['where']['date']}"
    what = "step time (ms), p10 to p90; ratio to no exchange"
    paths = [_draw_bars(spread, ratios, what, title, out / f"{name}step_time.png")]
    labels = [f"{value:,.0f} µs" for value, *_ in deltas.values()]
    what = "added to a step without exchange (µs)"
    return [*paths, _draw_bars(deltas, labels, what, title, out / f"{name}step_delta.png")]


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Return a figure of this size in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure  # here: it takes half a second, and few processes draw

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _draw_bars(bars: dict[str, Any], labels: list[str], what: str, title: str, path: Path) -> Path:
    """Draw a bar for each schedule: its value, with an error bar from `low` to `high`."""
    figure, [[axes]] = subplots(1, 1, (7, 3.8))
    values, low, high = np.array(list(bars.values())).T
    errors = np.maximum(0, [values - low, high - values])
    colours = [colour_of(mode) for mode in bars]
    drawn = axes.bar(list(bars), values, color=colours, yerr=errors, capsize=4, error_kw={"linewidth": 1})
    axes.bar_label(drawn, labels, padding=4, fontsize=9)
    axes.set_xticks(range(len(bars)), [mode.replace(":", "\n") for mode in bars], fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_ylabel(what, fontsize=9)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def caption(result: dict[str, Any]) -> str:
    """Return one line that says what was run on what."""
    settings, where = result["settings"], result["where"]
    documents = settings["num_documents"]
    return (
        f"{where['ranks']} x {where['device']}, hidden {settings['model']['hidden_size']}, "
        f"{settings['seq_len'] // where['ranks']} tokens a rank, "
        f"{'dense' if documents is None else f'{documents} documents'}, "
        f"{'forward' if settings['forward_only'] else 'forward + backward'}{_uses(settings['model'])}"
    )


def _uses(model: dict[str, Any]) -> str:
    """Return which activations a model rolls. Older records do not say."""
    embeddings = model.get("mtp_inputs") == "embeddings"
    distillation = model.get("distillation", "none")
    uses = {
        "embeddings": embeddings,
        "mixed hidden states": model.get("hidden_state_mixing"),
        f"{distillation} distillation": distillation != "none",
    }
    return "".join(f", {name}" for name, is_used in uses.items() if is_used)
