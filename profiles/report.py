"""How much of the communication in a profile is hidden under compute?

    python profiles/report.py profiles/h4096-packed.sqlite.gz --plot out/h4096.png
    python profiles/report.py out/rank0.json.gz out/rank1.json.gz --min-hidden 0.9

Reads SQLite exports of Nsight Systems (`nsys export --type sqlite`) and traces of torch.profiler (one file for each
rank), of this project or of any other. It needs neither torch nor a GPU. Exit status: 0; 1 if less is hidden than
`--min-hidden`, or there is nothing to judge; 2 if a file cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from overlap_mtp.profiling import ProfileError, perfetto, read_profile, report_on
from overlap_mtp.profiling.tables import percent, tables

OUTPUTS = {
    "--json": "write everything as JSON",
    "--plot": "draw a timeline into this PNG",
    "--perfetto": "write a trace for ui.perfetto.dev and chrome://tracing (.json or .json.gz)",
}
WIDTH = 100  # of the tables if there is no terminal


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line. Usage errors end the process with status 2."""
    parser = argparse.ArgumentParser(
        description="Report, for each device, schedule and range, how long communication took and how much of it was "
        "hidden.",
    )
    parser.add_argument("files", type=_path, nargs="+", metavar="FILE", help="profiles, gzipped or not")
    for name, text in OUTPUTS.items():
        parser.add_argument(name, type=_path, metavar="FILE", help=text)
    parser.add_argument(
        "--outside-steps",
        action="store_true",
        help="also report what ran outside of the steps (warm-up, checks)",
    )
    parser.add_argument(
        "--min-hidden",
        type=_fraction,
        metavar="FRACTION",
        help="exit with status 1 if a smaller fraction is hidden, on any device, of the exchange in prefetch steps (of "
        "all communication if the profile has no ranges of overlap_mtp)",
    )
    return parser.parse_args(arguments)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value


def main() -> int:
    """Report on the profiles that the command line names, and return the exit status."""
    options = parse()
    files, outputs = options.files, (options.json, options.plot, options.perfetto)
    json_out, plot_out, perfetto_out = outputs
    _check_paths(files, dict(zip(OUTPUTS, outputs, strict=True)))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)
    try:
        report = report_on([read_profile(file) for file in files], options.outside_steps)
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
    for path in filter(None, outputs):
        console.print(f"wrote {path}", soft_wrap=True)
    if options.min_hidden is not None:
        what, fraction = report.judged()
        passed, message = False, f"there is nothing to judge: the profile does not hold {what}"
        if fraction is not None:
            passed, wanted = (
                fraction >= options.min_hidden,
                f"at least {percent(options.min_hidden)} is wanted",
            )
            message = f"{percent(fraction)} of {what} is hidden on the worst device, {wanted}"
            if any(timeline.has_ours for timeline in report.timelines):
                unit = "µs of a step" if any(timeline.steps for timeline in report.timelines) else "µs in all"
                message += f"; join and unroll take {report.join_us():,.1f} {unit} on the slowest device"
        console.print(f"{'ok' if passed else 'FAILED'}: {message}", soft_wrap=True)
        return int(not passed)
    return 0


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
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
