"""The record of a benchmark of Megatron-LM's steps as tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dropin.modes import AGAIN, BASELINE, MODES, REFERENCE, is_equal
from harness import plots

COLOURS = {
    "megatron": "#b3402a",
    "megatron_host": "#d98b3a",
    "dropin": "#1f5f8b",
    "dropin_host": "#4f8a8b",
    "none": "#c4c4c4",
}
HEADINGS = ("documents", "mode", "ms by events", "/ none", "ms by wall clock", "/ none", "Megatron-LM's bits")
CAPTION = (
    "median over rounds of the slowest rank [95 % interval]; none: local rolls with wrong tokens, for timing only; the "
    "attention is ours"
)
OF_TIMING = ("modes", "documents", "rounds", "warmup", "limit", "train_steps", "optimizer")  # settings
Record = dict[str, Any]


def title_of(record: Record) -> str:
    """Return one line that says what was run on what."""
    where, settings = record["where"], dict(record["settings"])
    for name, earlier in (("preset", "size"), ("accumulate", "micro")):
        settings.setdefault(name, settings.get(earlier))
    extra = [f"tp {settings['tp']}"] if settings["tp"] > 1 else []
    extra += ["recomputed"] if settings["recompute"] else []
    extra += [f"{settings['accumulate']} microbatches"] if settings["accumulate"] > 1 else []
    used = [one for run in record["runs"].values() for one in run["status"].get("transports", ())]
    transport = " and ".join(dict.fromkeys(used)) or settings["transport"]
    return ", ".join(
        [
            f"Megatron-LM {where['megatron_core']}, {where['ranks']} x {where['device']}, {settings['preset']}",
            f"{settings['depths']} MTP layers",
            *extra,
            f"{settings['schedule']} over {transport}",
        ]
    )


def documents_of(name: str) -> str:
    """Return how a run is called: its number of documents, or dense."""
    return "dense" if name == "dense" else f"{name} documents"


def _figure(one: dict[str, float], digits: int) -> str:
    value, low, high = (f"{one[part]:.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _bits(run: Record, mode: str) -> str:
    if "bits" not in run:
        return "-"
    row = run["bits"][AGAIN if mode == REFERENCE else mode]
    if is_equal(row):
        return "all equal"
    if mode == BASELINE:
        return "no, timing only" if not row["mtp_losses"] else "EQUAL LOSSES"
    return f"NO: {row['equal_gradients']} of {row['gradients']} gradients, loss {'' if row['loss'] else 'not '}equal"


def _by_documents(record: Record) -> list[tuple[str, Any]]:
    """Return the runs by rising number of documents, dense ones first."""
    return sorted(record["runs"].items(), key=lambda run: 0 if run[0] == "dense" else int(run[0]))


def _lines(record: Record) -> Iterator[tuple[str, ...]]:
    for name, run in _by_documents(record):
        rows = run.get("rows", {})
        modes = rows.get("wall_ms") or [REFERENCE, *(one for one in run.get("bits", {}) if one != AGAIN)]
        for mode in modes:
            cells = []
            for clock in ("events_ms", "wall_ms"):
                row = rows.get(clock, {}).get(mode)
                cells += [f"{row['median_ms']:.2f}", _figure(row["ratio"], 3)] if row else ["-", "-"]
            yield (name, mode, *cells, _bits(run, mode))


def table_of(record: Record) -> Table:
    """Return the record as a table for the terminal, with a line for each number of documents and mode."""
    table = Table(title=title_of(record), caption=CAPTION)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for line in _lines(record):
        table.add_row(*line)
    return table


def markdown_of(record: Record) -> str:
    """Return the same in Markdown."""
    lines = [title_of(record), "", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
    lines += [f"| {' | '.join(line)} |" for line in _lines(record)]
    return "\n".join([*lines, "", CAPTION + "."]) + "\n"


def training_line(found: Record) -> str:
    """Return what a training with and without the drop-in has shown, in one line."""
    every = found["equal_steps"] == found["steps"] and found["weights_equal"]
    return (
        f"training, {documents_of(found['documents'] or 'dense')}, {found['optimizer']}: the losses of "
        f"{found['equal_steps']} of {found['steps']} steps are equal to the bit, final weights "
        f"{'too' if every else 'are equal' if found['weights_equal'] else 'DIFFER'}"
    )


def read_together(paths: Sequence[Path]) -> Record:
    """Return one record with the modes and documents of several, for `draw`.

    Every ratio stays that to the `none` of its own record. Of a mode that several records hold, the last counts.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no record, or two records are not of the same step on the same devices.
    """
    records = [json.loads(path.read_text()) for path in paths]
    runs: dict[str, Any] = {}
    for path, record in zip(paths, records, strict=True):
        if not isinstance(record, dict) or record.get("experiment") != "megatron_step":
            raise ValueError(f"{path} is not a record of megatron_step, which writes results.json")
        one, other = _step_of(records[0]), _step_of(record)
        if differing := [name for name in {**one, **other} if one.get(name) != other.get(name)]:
            raise ValueError(f"{paths[0]} and {path} must agree in {', '.join(differing)} to share a picture")
        for name, run in record["runs"].items():
            together = runs.setdefault(name, {"rows": {}, "status": {"transports": []}})
            together["status"]["transports"] += run["status"].get("transports", ())
            for clock, rows in run.get("rows", {}).items():
                together["rows"].setdefault(clock, {}).update(rows)
    return {**records[0], "runs": runs}


def _step_of(record: Record) -> dict[str, Any]:
    """Return what a record's ratios depend on."""
    where = {name: record["where"][name] for name in ("megatron_core", "ranks", "device")}
    return where | {name: value for name, value in record["settings"].items() if name not in OF_TIMING}


def draw(record: Record, path: Path) -> None:
    """Draw the step times over that of `none`: a group of bars for each number of documents, with 95 % intervals."""
    runs = {name: run["rows"] for name, run in _by_documents(record) if run.get("rows")}
    figure, [[axes]] = plots.subplots(1, 1, (1.6 + 2 * len(runs), 3.8))
    clock = "events_ms" if all("events_ms" in rows for rows in runs.values()) else "wall_ms"
    shown = [
        mode for mode in MODES if mode != BASELINE and any(mode in rows[clock] for rows in runs.values())
    ]
    groups = [[mode for mode in shown if mode in rows[clock]] for rows in runs.values()]
    width = 0.8 / max(1, len(shown))
    for mode in shown:
        at = [
            place + (group.index(mode) - (len(group) - 1) / 2) * width
            for place, group in enumerate(groups)
            if mode in group
        ]
        ratios = [rows[clock][mode]["ratio"] for rows in runs.values() if mode in rows[clock]]
        values, low, high = (np.array([one[part] for one in ratios]) for part in ("value", "low", "high"))
        bars = axes.bar(
            at,
            values,
            width,
            label=mode,
            color=COLOURS.get(mode, "#555555"),
            yerr=np.maximum(0, [values - low, high - values]),
            capsize=3,
            error_kw={"linewidth": 1},
        )
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(runs)), [documents_of(name) for name in runs], fontsize=9)
    axes.set_ylabel("step time / that of local rolls", fontsize=9)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    axes.set_title(title_of(record), fontsize=8)
    figure.savefig(path, dpi=130)
