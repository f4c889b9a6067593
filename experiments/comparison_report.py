"""Show the record of a comparison again: the table, the sentence and the page.

    python experiments/comparison_report.py out/compare/results.json
    python experiments/comparison_report.py out/compare/results.json --timeline out/timeline.png

Writes `report.html` beside `results.json`, or `NAME-report.html` beside a record `NAME.json` of a sweep. `--timeline`
puts a picture of a profile into it, which `profiles/report.py --plot` draws.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from compare.page import check_picture, write_page
from compare.report import read_record, show
from harness.command import check_out, default_is, parse_options, usage_errors
from harness.rounds import WIDTH


@dataclass(frozen=True)
class Options:
    """One page."""

    record: tyro.conf.Positional[Path]
    """`results.json` of compare_modes, or a record of sweep."""
    timeline: Annotated[Path | None, default_is("no timeline")] = None
    """Picture (.png or .svg) of a profile, for the page."""
    out: Annotated[Path | None, default_is("the record's")] = None
    """Folder for the page."""
    wide: bool = False
    """Print all columns of the table."""


def main() -> None:
    options = parse_options(Options, "Show the record of a comparison again, and write its page.")
    with usage_errors():
        result = read_record(options.record)
        if result is None:
            raise ValueError(
                f"{options.record} is not a record of a comparison: compare_modes writes results.json"
            )
        if options.timeline is not None:
            check_picture(options.timeline)
        folder = options.out or options.record.parent
        name = "report.html" if options.record.stem == "results" else f"{options.record.stem}-report.html"
        check_out(folder, name)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    page = write_page(result, folder / name, options.timeline)
    console.print(f"wrote {page}", soft_wrap=True)
    show(result, options.wide, console)


if __name__ == "__main__":
    main()
