"""What `roll_latency` found: a row for each method at each workload, a table and a picture of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from harness import plots, statistics
from harness.rounds import gather
from latency.candidate import Candidate

Row = dict[str, Any]
CAPTION = (
    "median [95 % interval] on the slowest rank, of all tensors and depths of a microbatch; GPU: in a CUDA graph; "
    "wrong: tokens that differ from the oracle's, and how many of them are valid"
)


def rows_of(candidates: list[Candidate]) -> list[Row] | None:
    """Gather what all ranks measured. Collective.

    Args:
        candidates: of this rank, in the same order on all ranks.

    Returns:
        A row for each candidate on rank 0, else None. A roll takes as long as on its slowest rank.
    """
    everyone = gather([(one.times_us, one.sent or (0, 0), one.differs) for one in candidates])
    return everyone and [_row(*one) for one in zip(candidates, zip(*everyone, strict=True), strict=True)]


def _row(candidate: Candidate, by_rank: tuple[Any, ...]) -> Row:
    times_us, sent, differs = zip(*by_rank, strict=True)
    row: Row = {**asdict(candidate.method), **asdict(candidate.case.workload)}
    for name in candidate.times_us:
        row[f"{name}_us"] = _summary([one[name] for one in times_us])
    for at, name in enumerate(("messages", "bytes")):
        row[name] = None if candidate.sent is None else max(one[at] for one in sent)
    for at, name in enumerate(("differing_tokens", "differing_valid_tokens")):
        row[name] = sum(one[at] for one in differs)
    return row


def _summary(by_rank: list[list[float]]) -> dict[str, float] | None:
    samples = np.array(by_rank, np.float64).max(0, initial=0)
    if not samples.size:
        return None
    estimate = statistics.median(samples)
    named = {"median": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: round(value, 2) for name, value in named.items()}


def _name(row: Row) -> str:
    return f"{row['schedule']} {row['transport']}".rstrip()


def _title(record: dict[str, Any]) -> str:
    where, tokens = record["where"], record["rows"][0]["tokens"]
    return f"{where['ranks']} x {where['device']}, {tokens} tokens a rank, {where['date']}"


def table_of(record: dict[str, Any]) -> Table:
    """Return the record as a table with a line for each row."""
    table = Table(
        title=_title(record), caption=CAPTION, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    for heading in ("depths", "documents"):
        table.add_column(heading, no_wrap=True, min_width=len(heading))
    table.add_column("schedule", min_width=13)  # of process_group
    for heading, least in (("host µs", 7), ("wall µs", 9), ("GPU µs", 9), ("messages", 8), ("wrong", 6)):
        table.add_column(heading, justify="right", min_width=least)  # an interval may take two lines
    for row in record["rows"]:
        times = [f"{row['host_us']['median']:,.0f}" if row["host_us"] else "-"]
        for one in (row["wall_us"], row["gpu_us"]):
            digits = 0 if one and one["median"] >= 100 else 1
            times.append(_interval(one, digits) if one else "-")
        wrong = f"{row['differing_tokens']}, {row['differing_valid_tokens']}"
        documents = str(row["documents"] or "dense")
        table.add_row(str(row["depths"]), documents, _name(row), *times, _count(row["messages"]), wrong)
    return table


def _interval(one: dict[str, float], digits: int) -> str:
    median, low, high = (f"{one[part]:,.{digits}f}" for part in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw host time by documents and by depths, and GPU time by depths if graphs ran.

    What a panel does not vary is the middle one of its values.

    Args:
        record: of `roll_latency`.
        path: of the picture.
    """
    rows, settings = record["rows"], record["settings"]
    panels = [("host", "documents", "depths"), ("host", "depths", "documents")]
    if any(row["gpu_us"] for row in rows):
        panels.append(("gpu", "depths", "documents"))
    figure, [all_axes] = plots.subplots(1, len(panels), (5 * len(panels), 4.2))
    for axes, (clock, varied, fixed) in zip(all_axes, panels, strict=True):
        middle = settings[fixed][len(settings[fixed]) // 2]
        shown = [row for row in rows if row[fixed] == middle and row[f"{clock}_us"]]
        for name in dict.fromkeys(map(_name, shown)):
            _plot(axes, [row for row in shown if _name(row) == name], varied, f"{clock}_us")
        axes.set(xscale="log", yscale="log", title=f"{fixed}: {middle}", xlabel=varied)
        if varied == "documents":  # a dense sequence has none
            axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(settings[varied], map(str, settings[varied]))
        axes.set_ylabel(f"{clock} µs of a microbatch's rolls")
        axes.grid(alpha=0.3, which="both")
    all_axes[0].legend(handlelength=4, fontsize=7)
    figure.suptitle(f"{_title(record)}; median and 95 % interval; 0 documents: dense", fontsize=9)
    figure.savefig(path, dpi=130)


def _plot(axes: Any, rows: list[Row], varied: str, quantity: str) -> None:
    """Draw the line of one method."""
    median, low, high = (
        np.array([row[quantity][part] for row in rows]) for part in ("median", "low", "high")
    )
    axes.errorbar(
        [row[varied] for row in rows],
        median,
        [median - low, high - median],
        color=plots.COLOURS.get(rows[0]["schedule"], "#222222"),
        linestyle="--" if rows[0]["transport"] in ("symmetric", "device") else "-",
        marker="o",
        markersize=3,
        capsize=2,
        label=_name(rows[0]),
    )
