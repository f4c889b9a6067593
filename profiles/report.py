"""How much of the communication in a profile is hidden under compute?

    python profiles/report.py profiles/h4096-packed.sqlite.gz --plot out/h4096.png
    python profiles/report.py out/rank0.json.gz out/rank1.json.gz --min-hidden 0.9

Reads SQLite exports of Nsight Systems (`nsys export --type sqlite`) and traces of torch.profiler (one file for each
rank), of this project or of any other. Exit status: 0; 1 if less is hidden than `--min-hidden`, or there is nothing
to judge; 2 if a file cannot be read or written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from overlap_mtp.profiling import ProfileError, Report, read_profile, report_on
from overlap_mtp.profiling.overlap import Row

WIDTH = 150  # of the tables if there is no terminal
MOST_ROWS = 12  # shown for one schedule on one device
SCHEDULES_CAPTION = (
    "hidden: of all devices (of the worst device). efficiency: 1 - exposed step time / that of sync"
)
ROWS_CAPTION = (
    "µs, launches and bytes: of a mean step, or of the whole profile if there are no steps. hidden: under "
    "compute on the same device. peer wait: own duration less the shortest participant's."
)


def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles, gzipped or not.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Draw a timeline into this PNG.")] = None,
    min_hidden: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit with status 1 if a smaller fraction is hidden, on any device, of the exchange in prefetch "
            "steps (of all communication if the profile has no ranges of overlap_mtp).",
        ),
    ] = None,
) -> None:
    """Report, for each device, schedule and range, how long communication took and how much of it was hidden."""
    _check_paths(files, json_out, plot_out)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)
    try:
        report = report_on([read_profile(file) for file in files])
        if report.rows:
            console.print(rows_table(report.rows))
        console.print(schedules_table(report))
        for note in report.notes:
            console.print(note, soft_wrap=True)
        if json_out is not None:
            json_out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        if plot_out is not None:
            from overlap_mtp.profiling.plot import plot

            plot(report.timelines, plot_out)
    except (ProfileError, OSError) as error:
        _fail(str(error))
    if min_hidden is not None:
        what, fraction = report.judged()
        passed, message = False, f"there is nothing to judge: the profile does not hold {what}"
        if fraction is not None:
            passed, wanted = fraction >= min_hidden, f"at least {_percent(min_hidden)} is wanted"
            message = f"{_percent(fraction)} of {what} is hidden on the worst device, {wanted}"
        console.print(f"{'ok' if passed else 'FAILED'}: {message}", soft_wrap=True)
        raise typer.Exit(int(not passed))


def _check_paths(files: Sequence[Path], json_out: Path | None, plot_out: Path | None) -> None:
    """Find what is wrong with the paths before any file is read."""
    for option, path in (("--json", json_out), ("--plot", plot_out)):
        if path is None:
            continue
        if path.exists() and any(file.exists() and path.samefile(file) for file in files):
            _fail(f"{path.name}: {option} would overwrite the profile: name another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except OSError as error:
            _fail(f"{option}: {error}")
    if plot_out is not None:
        if json_out is not None and json_out.resolve() == plot_out.resolve():
            _fail(f"{plot_out.name}: --json and --plot name one file")
        from overlap_mtp.profiling.plot import can_write  # matplotlib takes a second to import

        if not can_write(plot_out):
            _fail(
                f"{plot_out.name}: a picture cannot be written as {plot_out.suffix}: use .png, .pdf or .svg"
            )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def rows_table(rows: Sequence[Row]) -> Table:
    """Return one line for each range of each schedule on each device; only the longest if there are many."""
    table = Table(caption=ROWS_CAPTION)
    for heading in ("device", "schedule", "range", "kind"):
        table.add_column(heading, overflow="fold")
    for heading in ("µs", "hidden µs", "exposed µs", "hidden", "peer wait µs", "launches", "bytes"):
        table.add_column(heading, justify="right")
    for (device, schedule), group in groupby(rows, lambda row: (row.device, row.schedule)):
        members = list(group)
        by_time = sorted(members, key=lambda row: -row.time_us)
        rest = by_time[MOST_ROWS:]
        for row in by_time[:MOST_ROWS] if rest else members:
            steps = max(1, row.steps)
            table.add_row(
                Text(device),
                schedule,
                Text(row.range),  # not markup, whatever brackets it holds
                row.kind,
                *(_number(value, steps, 1) for value in (row.time_us, row.hidden_us, row.exposed_us)),
                _percent(row.hidden_fraction),
                _number(row.peer_wait_us, steps, 1),
                _number(row.launches, steps, 0 if row.launches % steps == 0 else 1),
                _number(row.bytes, steps, 0),
            )
        if rest:
            time_us = sum(row.time_us / max(1, row.steps) for row in rest)
            table.add_row(Text(device), schedule, f"{len(rest)} others", "", f"{time_us:,.1f}")
        table.add_section()
    return table


def schedules_table(report: Report) -> Table:
    """Return one line for each schedule, over all devices."""
    table = Table(caption=SCHEDULES_CAPTION)
    table.add_column("schedule")
    for heading in ("steps", "step ms", "exchange hidden", "all communication hidden", "overlap efficiency"):
        table.add_column(heading, justify="right")
    for one in report.schedules:
        table.add_row(
            one.name,
            _number(one.steps or None, 1, 0),
            _number(one.step_ms, 1, 3),
            f"{_percent(one.exchange_hidden)} ({_percent(one.exchange_worst)})",
            f"{_percent(one.all_hidden)} ({_percent(one.all_worst)})",
            _number(one.efficiency, 1, 3),
        )
    return table


def _number(value: float | None, steps: int, digits: int) -> str:
    return "-" if value is None else f"{value / steps:,.{digits}f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


if __name__ == "__main__":
    typer.run(main)
