"""The record of a comparison as a table, in a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compare.comparison import BASELINE, TIMING_ONLY
from harness import plots
from harness.command import write_record

CAPTION = (
    "median [95 % interval]; step delta: step minus prepared step; stall: how long the rolls held up the compute "
    "stream of the slowest rank, by CUDA events; messages and KB of all ranks together"
)
Row = dict[str, Any]


def _interval(one: dict[str, float] | None, digits: int) -> str:
    if one is None:
        return "-"
    value, low, high = (f"{one[part]:.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _efficiency(mode: str, row: Row) -> str:
    return _interval(None if mode in (BASELINE, TIMING_ONLY) else row["efficiency"], 2)


def _same(mode: str, row: Row) -> str:
    if mode in (BASELINE, TIMING_ONLY):
        return "the reference" if mode == BASELINE else "timing only"
    return ", ".join("yes" if row[which] else "NO" for which in ("rolls_equal", "loss_equal"))


COLUMNS: dict[str, Callable[[str, Row], str]] = {
    "schedule": lambda mode, _: mode,
    "step ms (p10-p90)": lambda _, row: f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})",
    "/ prepared": lambda _, row: _interval(row["ratio"], 4),
    "step delta µs": lambda _, row: _interval(row["step_delta_us"], 0),
    "stall µs": lambda _, row: _interval(row["stall_us"], 0),
    "efficiency": _efficiency,
    "tokens/s": lambda _, row: f"{row['tokens_per_s']:,.0f}",
    "host µs": lambda _, row: f"{row['host_us']:.0f}",
    "messages": lambda _, row: f"{row['messages_per_step']:.0f}",
    "KB": lambda _, row: f"{row['bytes_per_step'] / 1000:.1f}",
    "loss": lambda _, row: f"{row['loss']:.5f}",
    "same rolls, loss": _same,
}


def table_of(result: dict[str, Any]) -> Table:
    """Return the record as a table for the terminal, with a line for each schedule."""
    table = Table(title=plots.caption(result), caption=CAPTION)
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for mode, row in result["rows"].items():
        table.add_row(*(cell(mode, row) for cell in COLUMNS.values()))
    return table


def publish(result: dict[str, Any], path: Path, prefix: str, console: Console) -> None:
    """Write the record and its two pictures, and print it as a table.

    Args:
        result: the record.
        path: of its file.
        prefix: of the pictures' names, in the same folder.
        console: to print on.
    """
    paths = [write_record(result, path), *plots.draw(result, path.parent, prefix)]
    console.print(table_of(result))
    console.print("wrote " + ", ".join(str(one) for one in paths), soft_wrap=True)


def markdown_of(results: dict[str, dict[str, Any]]) -> str:
    """Return the records, by name, as one Markdown table with a line for each schedule of each."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", "|" + (1 + len(COLUMNS)) * "---|"]
    for name, result in results.items():
        for mode, row in result["rows"].items():
            lines.append(f"| {name} | {' | '.join(cell(mode, row) for cell in COLUMNS.values())} |")
    return "\n".join(lines) + "\n"
