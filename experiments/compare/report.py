"""The record of a comparison as a table in the terminal, as Markdown, as pictures and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compare.columns import NARROW, NARROW_CAPTION, WIDE, WIDE_CAPTION
from compare.page import page_of, write_page
from compare.sentence import contest_in, sentence_of
from harness import plots
from harness.command import write_record

FULL_WIDTH = 100  # columns; in a narrower terminal the name of a transport gets a line of its own


def table_of(result: dict[str, Any], wide: bool, width: int) -> Table:
    """Return the record as a table for the terminal, with a line for each schedule.

    The narrow table fits into 100 columns. Print it without cropping: a column is at least as wide as its longest word,
    so that no number is ever cut.

    Args:
        result: the record.
        wide: with all columns.
        width: of the terminal.
    """
    columns, caption = (WIDE, WIDE_CAPTION) if wide else (NARROW, NARROW_CAPTION)
    table = Table(
        title=Text(plots.caption(result)),
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    lines = [[cell(mode, row) for cell in columns.values()] for mode, row in result["rows"].items()]
    for at, heading in enumerate(columns):
        if not at and width < FULL_WIDTH:
            for line in lines:
                line[0] = line[0].replace(":", ":\n")
        longest = max(len(word) for text in (heading, *(line[at] for line in lines)) for word in text.split())
        table.add_column(heading, justify="right" if at else "left", min_width=longest)
    for line in lines:
        table.add_row(*line)
    return table


def show(result: dict[str, Any], wide: bool, console: Console) -> None:
    """Print the record as a table and, as the last line, as a sentence.

    Args:
        result: the record.
        wide: all columns of the table.
        console: to print on.
    """
    console.print(table_of(result, wide, console.width), crop=False)
    console.print()
    console.print(Text(sentence_of(result)), soft_wrap=not console.is_terminal)


def publish(result: dict[str, Any], path: Path, prefix: str, console: Console, wide: bool = False) -> None:
    """Write the record, its two pictures and its page, and print it.

    Args:
        result: the record.
        path: of its file.
        prefix: of the names of the pictures and the page, in the same folder.
        console: to print on.
        wide: print all columns of the table.
    """
    paths = [
        write_record(result, path),
        *plots.draw(result, contest_in(result).baseline, path.parent, prefix),
    ]
    paths.append(write_page(result, path.parent / f"{prefix}report.html"))
    console.print("wrote " + ", ".join(str(one) for one in paths), soft_wrap=True)
    show(result, wide, console)


def markdown_of(results: dict[str, dict[str, Any]]) -> str:
    """Return the records, by name, as one Markdown table with a line for each schedule of each."""
    lines = [f"| run | {' | '.join(WIDE)} |", "|" + (1 + len(WIDE)) * "---|"]
    for name, result in results.items():
        for mode, row in result["rows"].items():
            lines.append(f"| {name} | {' | '.join(cell(mode, row) for cell in WIDE.values())} |")
    return "\n".join(lines) + "\n"


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record of a comparison, or return None if the file is JSON of another kind.

    Raises:
        ValueError: the file is no JSON, or says to be such a record and is not.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("experiment") != "compare_modes":
            return None
        markdown_of({path.stem: record})
        page_of(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of a comparison: {error!r}") from None
    return record
