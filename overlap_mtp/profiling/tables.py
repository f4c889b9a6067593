"""The report as tables for a terminal: the schedules, then each device, then its ranges.

Numbers are never cut: if a terminal is too narrow, names are folded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from overlap_mtp.profiling.report import Report, Row
from overlap_mtp.profiling.schedule_names import OUTSIDE

MOST_ROWS = 12  # shown for one schedule on one device
NAME_WIDTH = 12  # of longer names, when they have to be folded
SCHEDULES_CAPTION = (
    "hidden %: of the exchange and of all communication, that part which lies under compute; worst: on the worst "
    "device; p10: a tenth of the steps hide less of their exchange. overlap efficiency: 1 - exposed step time / "
    "that of sync."
)
TOTALS_CAPTION = (
    "µs of a mean step, or of the whole profile if there are no steps. hidden: under compute on the same device. "
    "peer wait: own duration less the shortest participant's."
)
ONLY_STEPS = " What ran outside of the steps is left out (--outside-steps shows it)."
Cells = Sequence[str]


def tables(report: Report, width: int) -> Iterator[Table]:
    """Yield the tables of a report from top to bottom.

    Args:
        report: what was found.
        width: of the terminal. A table is wider only if its numbers take more.
    """
    for table in (_schedules(report), _totals(report), *_ranges(report.rows)):
        least = sum((column.min_width or 0) + 1 for column in table.columns) - 1
        table.width = least if least > width else None
        yield table


def percent(fraction: float | None) -> str:
    """Return a fraction as "12.3 %"."""
    return "-" if fraction is None else f"{_percentage(fraction)} %"


def _schedules(report: Report) -> Table:
    """One line for each schedule, over all devices."""
    shares = ["exchange\nhidden %", "\nworst", "\np10", "all\nhidden %", "\nworst"]
    rows = [
        (
            one.name,
            _number(one.steps or None, 1, 0),
            _number(one.step_ms, 1, 3),
            *map(
                _percentage,
                (one.exchange_hidden, one.exchange_worst, one.exchange_p10, one.all_hidden, one.all_worst),
            ),
            _number(one.efficiency, 1, 3),
        )
        for one in report.schedules
    ]
    numbers = ["steps", "step ms", *shares, "overlap\nefficiency"]
    return _table("Schedules", ["schedule"], numbers, rows, rows, SCHEDULES_CAPTION)


def _totals(report: Report) -> Table:
    """One line for each schedule on each device."""
    rows = []
    for one in report.totals:
        steps = max(1, one.steps)
        times = (one.communication_us, one.hidden_us, one.exposed_us)
        rows.append(
            (
                one.device,
                one.schedule,
                *(_number(time, steps, 1) for time in times),
                _percentage(one.hidden_fraction),
                _number(one.peer_wait_us, steps, 1),
            )
        )
    numbers = ["communi-\ncation µs", "hidden\nµs", "exposed\nµs", "hidden\n%", "peer wait\nµs"]
    names = {total.schedule for total in report.totals}
    left_out = any(timeline.steps for timeline in report.timelines) and OUTSIDE not in names
    caption = TOTALS_CAPTION + ONLY_STEPS * left_out
    return _table("All communication of each device", ["device", "schedule"], numbers, rows, rows, caption)


def _ranges(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each schedule on each device with a line for each range; only the longest if there are many."""
    groups = [
        (f"{device}, {schedule}", list(_range_cells(list(members))))
        for (device, schedule), members in groupby(rows, lambda row: (row.device, row.schedule))
    ]
    everything = [cells for _, group in groups for cells in group]
    numbers = ["\nµs", "hidden\nµs", "exposed\nµs", "hidden\n%", "peer wait\nµs", "\nlaunches", "\nbytes"]
    for title, group in groups:
        yield _table(title, ["range", "kind"], numbers, group, everything)


def _range_cells(rows: Sequence[Row]) -> Iterator[Cells]:
    by_time = sorted(rows, key=lambda row: -row.time_us)
    rest = by_time[MOST_ROWS:]
    for row in by_time[:MOST_ROWS] if rest else rows:
        steps = max(1, row.steps)
        yield (
            row.range,
            row.kind,
            _number(row.time_us, steps, 1),
            _number(row.hidden_us, steps, 1),
            _number(row.exposed_us, steps, 1),
            _percentage(row.hidden_fraction),
            _number(row.peer_wait_us, steps, 1),
            _number(row.launches, steps, 0 if row.launches % steps == 0 else 1),
            _number(row.bytes, steps, 0),
        )
    if rest:
        time_us = sum(row.time_us / max(1, row.steps) for row in rest)
        yield f"{len(rest)} others", "", f"{time_us:,.1f}", *[""] * 6


def _table(
    title: str,
    names: Sequence[str],
    numbers: Sequence[str],
    rows: Sequence[Cells],
    widest: Sequence[Cells],
    caption: str = "",
) -> Table:
    """Return a table.

    Args:
        title: above it.
        names: headings of the columns with text.
        numbers: headings of the columns with numbers, which are to the right.
        rows: its cells.
        widest: the rows that its columns must have room for, so that several tables agree.
        caption: below it.
    """
    table = Table(
        title=Text(title),  # not markup, whatever brackets it holds
        title_justify="left",
        caption=caption and Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for at, heading in enumerate([*(f"\n{name}" for name in names), *numbers]):
        width = max((len(row[at]) for row in widest), default=0)
        if at < len(names):
            table.add_column(heading, overflow="fold", min_width=min(width, NAME_WIDTH))
        else:
            width = max(width, *map(len, heading.split("\n")))
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def _number(value: float | None, steps: int, digits: int) -> str:
    return "-" if value is None else f"{value / steps:,.{digits}f}"


def _percentage(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"
