"""How much of the communication in a profile is hidden under compute?

    python profiles/report.py profiles/h4096-packed.sqlite.gz --plot out/h4096.png
    python profiles/report.py out/rank0.json.gz out/rank1.json.gz --min-hidden 0.9

Reads SQLite exports of Nsight Systems (`nsys export --type sqlite`) and traces of torch.profiler (one file for each
rank), of this project or of any other. It needs neither torch nor a GPU. Exit status: 0; 1 if less is hidden than
`--min-hidden`, or there is nothing to judge; 2 if a file cannot be read or written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from overlap_mtp.profiling import ProfileError, perfetto, read_profile, report_on
from overlap_mtp.profiling.tables import percent, tables

WIDTH = 100  # of the tables if there is no terminal


def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles, gzipped or not.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Draw a timeline into this PNG.")] = None,
    perfetto_out: Annotated[
        Path | None,
        typer.Option(
            "--perfetto", help="Write a trace for ui.perfetto.dev and chrome://tracing (.json or .json.gz)."
        ),
    ] = None,
    outside_steps: Annotated[
        bool,
        typer.Option("--outside-steps", help="Also report what ran outside of the steps (warm-up, checks)."),
    ] = False,
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
    _check_paths(files, {"--json": json_out, "--plot": plot_out, "--perfetto": perfetto_out})
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)
    try:
        report = report_on([read_profile(file) for file in files], outside_steps)
        if json_out is not None:
            json_out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        if plot_out is not None:
            from overlap_mtp.profiling.plot import plot

            plot(report.timelines, plot_out)
        if perfetto_out is not None:
            perfetto.write_trace(report.timelines, perfetto_out)
    except (ProfileError, OSError) as error:
        _fail(str(error))
    for table in tables(report, console.width):
        console.print(table, crop=False)
        console.print()
    for note in report.notes:
        console.print(note, soft_wrap=True)
    for path in filter(None, (json_out, plot_out, perfetto_out)):
        console.print(f"wrote {path}", soft_wrap=True)
    if min_hidden is not None:
        what, fraction = report.judged()
        passed, message = False, f"there is nothing to judge: the profile does not hold {what}"
        if fraction is not None:
            passed, wanted = fraction >= min_hidden, f"at least {percent(min_hidden)} is wanted"
            message = f"{percent(fraction)} of {what} is hidden on the worst device, {wanted}"
        console.print(f"{'ok' if passed else 'FAILED'}: {message}", soft_wrap=True)
        raise typer.Exit(int(not passed))


def _check_paths(files: Sequence[Path], outputs: Mapping[str, Path | None]) -> None:
    """Find what is wrong with the paths before any file is read."""
    named = {option: path for option, path in outputs.items() if path is not None}
    for option, path in named.items():
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
    for one, other in combinations(named, 2):
        if named[one].resolve() == named[other].resolve():
            _fail(f"{named[one].name}: {one} and {other} name one file")
    trace, picture = outputs["--perfetto"], outputs["--plot"]
    if trace is not None and not perfetto.can_write(trace):
        _fail(f"{trace.name}: --perfetto writes JSON: name a file that ends in .json or .json.gz")
    if picture is not None:
        from overlap_mtp.profiling.plot import can_write  # matplotlib takes a second to import

        if not can_write(picture):
            _fail(f"{picture.name}: a picture cannot be written as {picture.suffix}: use .png, .pdf or .svg")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
