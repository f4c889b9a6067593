"""How much of the communication in a profile is hidden under compute?

    python profiles/report.py profiles/h4096.sqlite.gz --picture out/h4096.png
    python profiles/report.py out/rank0.json.gz out/rank1.json.gz --min-hidden 0.9

Reads SQLite exports of Nsight Systems (`nsys export --type sqlite`) and traces of torch.profiler (one file a rank),
of this project or of any other. Exit status: 0; 1 if less is hidden than `--min-hidden`, or there is nothing to
judge; 2 if a file cannot be read or written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from overlap_mtp.profiling import ProfileError, Report, read_profile, report_on
from overlap_mtp.profiling.overlap import Row

WIDTH = 150  # of the tables where there is no terminal
MOST_ROWS = 12  # shown of one schedule on one device
SCHEDULES_CAPTION = (
    "hidden: of all devices (of the worst device). efficiency: 1 - exposed step time / that of sync"
)
CAPTION = (
    "µs, launches and bytes: of a mean step, or of the whole profile where there are no steps. hidden: under "
    "compute on the same device. peer wait: own duration less the shortest participant's."
)


def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles, gzipped or not.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Writes everything as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draws a timeline into this PNG.")] = None,
    min_hidden: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit status 1 if a smaller fraction is hidden, on any device, of the exchange in prefetch steps "
            "(of all communication where the profile has no ranges of overlap_mtp).",
        ),
    ] = None,
) -> None:
    """Reports, for each device, schedule and range, how long communication took and how much of it was hidden."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)
    try:
        report = report_on([read_profile(file) for file in files])
        show(report, console)
        write(report, json_out, picture)
    except (ProfileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if min_hidden is not None and not passes(report, min_hidden, console):
        raise typer.Exit(1)


def show(report: Report, console: Console) -> None:
    """Prints the tables, and what has to be said about them."""
    if report.rows:
        console.print(rows_table(report.rows))
    console.print(schedules_table(report))
    for note in report.notes:
        console.print(note, soft_wrap=True)


def write(report: Report, json_out: Path | None, picture: Path | None) -> None:
    """Writes the files that were asked for."""
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if picture is not None:
        from overlap_mtp.profiling.plot import draw  # matplotlib takes a second to import

        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(report.lanes, picture)


def passes(report: Report, min_hidden: float, console: Console) -> bool:
    """Says what was judged and how it stands."""
    what, fraction = report.judged()
    if fraction is None:
        console.print(f"FAILED: there is nothing to judge: the profile does not hold {what}", soft_wrap=True)
        return False
    verdict = "ok" if fraction >= min_hidden else "FAILED"
    console.print(
        f"{verdict}: {_percent(fraction)} of {what} is hidden on the worst device, "
        f"at least {_percent(min_hidden)} is wanted",
        soft_wrap=True,
    )
    return fraction >= min_hidden


def rows_table(rows: Sequence[Row]) -> Table:
    """One line for each range of each schedule on each device; the longest of them where there are many."""
    table = Table(caption=CAPTION)
    for heading in ("device", "schedule", "range", "kind"):
        table.add_column(heading, overflow="fold")
    for heading in ("µs", "hidden µs", "exposed µs", "hidden", "peer wait µs", "launches", "bytes"):
        table.add_column(heading, justify="right")
    for (device, schedule), group in groupby(rows, lambda row: (row.device, row.schedule)):
        members = list(group)
        shown = (
            sorted(members, key=lambda row: -row.time_us)[:MOST_ROWS] if len(members) > MOST_ROWS else members
        )
        for row in shown:
            table.add_row(Text(device), schedule, *_cells(row))
        if len(members) > len(shown):
            rest = members_time(members) - members_time(shown)
            table.add_row(Text(device), schedule, f"{len(members) - len(shown)} others", "", f"{rest:,.1f}")
        table.add_section()
    return table


def members_time(rows: Sequence[Row]) -> float:
    """µs of several rows, as shown."""
    return sum(row.time_us / max(1, row.steps) for row in rows)


def _cells(row: Row) -> tuple[str | Text, ...]:
    steps = max(1, row.steps)
    times = [row.time_us, row.hidden_us, row.exposed_us]
    return (
        Text(row.range),  # not markup, whatever brackets it holds
        row.kind,
        *(_number(value, steps, 1) for value in times),
        _percent(row.hidden_fraction),
        _number(row.peer_wait_us, steps, 1),
        _number(row.launches, steps, 0 if row.launches % steps == 0 else 1),
        _number(row.bytes, steps, 0),
    )


def schedules_table(report: Report) -> Table:
    """One line for each schedule, over all devices."""
    table = Table(caption=SCHEDULES_CAPTION)
    table.add_column("schedule")
    for heading in ("steps", "step ms", "exchange hidden", "all communication hidden", "overlap efficiency"):
        table.add_column(heading, justify="right")
    for one in report.schedules:
        table.add_row(
            one.name,
            str(one.steps) if one.steps else "-",
            "-" if one.step_ms is None else f"{one.step_ms:.3f}",
            f"{_percent(one.exchange_hidden)} ({_percent(one.exchange_worst)})",
            f"{_percent(one.all_hidden)} ({_percent(one.all_worst)})",
            "-" if one.efficiency is None else f"{one.efficiency:.3f}",
        )
    return table


def _number(value: float | None, steps: int, digits: int) -> str:
    return "-" if value is None else f"{value / steps:,.{digits}f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


if __name__ == "__main__":
    typer.run(main)
