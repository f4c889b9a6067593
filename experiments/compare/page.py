"""The record of a comparison as one HTML page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from compare.bars import bars_of
from compare.columns import NARROW, NARROW_CAPTION
from compare.comparison import TIMING_ONLY, Contest
from compare.markup import element, html_of
from compare.sentence import contest_in, meaning_of, sentence_of, worth_of, wrong_bits
from harness import plots

PICTURES = {
    ".png": "image/png",
    ".svg": "image/svg+xml",
}  # kinds of a timeline, by the end of its file's name
ON_CPU = (
    "These ranks are CPU processes. They show bits and messages, and what each message costs the host. They compute "
    "on the cores that also send, so that hardly anything can be hidden. If other work runs on the machine, rounds "
    "come in slow and fast spells, and intervals, which take rounds as independent, are too narrow."
)
PROFILED = "A profiler recorded these steps, which costs host time: take step times from a run without one."
STYLE = Path(__file__).parent / "page.css"
LOOKS = {"yes": "good", "equal": "good", "NO": "bad", "DIFFERENT": "bad"}  # of cells, by what they say
Record = dict[str, Any]


def page_of(result: Record, timeline: Path | None = None) -> str:
    """Return the record as a page: what it says, bars, table, timeline, bits, command and environment.

    Args:
        result: the record.
        timeline: a picture (PNG or SVG) of a profile of such steps, which the page will hold.

    Raises:
        ValueError: the picture is of another kind.
        OSError: it cannot be read.
    """
    sentence, worth, subject = sentence_of(result), worth_of(result), plots.caption(result)
    contest = contest_in(result)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Schedules compared: {subject}"),
        element("style", STYLE.read_text()),
    )
    main = element(
        "main",
        element("h1", "What the boundary exchange costs"),
        element("p", f"{subject}, {result['where']['date']}", class_="quiet"),
        element("p", sentence, class_="sentence wrong" if wrong_bits(result) else "sentence"),
        *([] if worth is None else [element("p", worth)]),
        element("p", meaning_of(contest), class_="quiet"),
        *([element("p", ON_CPU, class_="quiet")] if result["where"]["device"] == "CPU" else []),
        *([element("p", PROFILED, class_="quiet")] if _is_profiled(result) else []),
        *_times(result, contest),
        *([] if timeline is None else _timeline(timeline)),
        *_bits(result, contest),
        *_how(result),
    )
    return html_of(element("html", head, element("body", main), lang="en"))


def write_page(result: Record, path: Path, timeline: Path | None = None) -> Path:
    """Write `page_of` the arguments, and return the path."""
    path.write_text(page_of(result, timeline), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def check_picture(path: Path) -> None:
    """Raise ValueError unless a page can hold this picture."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(
            f"--timeline must be a {' or '.join(PICTURES)}, got {path}: profiles/report.py --plot draws one"
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a file: profiles/report.py --plot draws a timeline")


def _times(result: Record, contest: Contest) -> Iterator[Element]:
    yield element("h2", "Step time over that without any exchange")
    caption = (
        f"1 + the median difference of steps of the same round over the median step of {contest.baseline}, which is "
        "steadier than a quotient of medians; the line across a bar's end is its 95 % interval. "
        f"Dashed: {contest.baseline}, a step without any exchange."
    )
    yield element("figure", bars_of(result["rows"]), element("figcaption", caption))
    yield element("h2", "Step times")
    lines = [[cell(mode, row) for cell in NARROW.values()] for mode, row in result["rows"].items()]
    yield _table("Step times", list(NARROW), lines)
    yield element("p", f"{NARROW_CAPTION[0].upper()}{NARROW_CAPTION[1:]}.", class_="quiet")


def _timeline(picture: Path) -> Iterator[Element]:
    check_picture(picture)
    data = base64.b64encode(picture.read_bytes()).decode()
    source = f"data:{PICTURES[picture.suffix.lower()]};base64,{data}"
    words = "Timeline of a profile of such steps: a row for each stream of one device"
    yield element("h2", "Timeline")
    image = _scrolling("Timeline", element("img", src=source, alt=words))
    yield element("figure", image, element("figcaption", f"{words}."))


def _bits(result: Record, contest: Contest) -> Iterator[Element]:
    yield element("h2", "Bits")
    with_gradients = all("gradients_equal" in row for row in result["rows"].values())
    compared, lines = ["rolls", "loss", *(["gradients"] if with_gradients else [])], []
    for mode, row in result["rows"].items():
        cells = ["equal" if row[f"{what}_equal"] else "DIFFERENT" for what in compared]
        if mode == TIMING_ONLY:
            cells = len(compared) * ["timing only"]
        lines.append([mode, *cells, f"{row['loss']:.5f}"])
    yield _table("Bits", ["schedule", *compared, "last loss"], lines)
    tensors = "rolled tensors and all gradients" if with_gradients else "rolled tensors"
    words = (
        f"In each timed step, all {tensors} on all ranks were compared with those that {contest.reference} gives, "
        f"and the loss with that of {contest.reference}, bit for bit."
    )
    yield element("p", words, class_="quiet")


def _how(result: Record) -> Iterator[Element]:
    yield element("h2", "Command")
    yield element("pre", element("code", result.get("command", "not recorded")))
    yield element("h2", "Environment")
    yield _facts(result["where"])
    yield element("h2", "Settings")
    yield _facts({name: value for name, value in result["settings"].items() if name != "modes"})
    transports = ", ".join(f"{mode} over {name}" for mode, name in result["transport"].items() if name)
    yield element("p", f"Transports: {transports or 'none'}.", class_="quiet")


def _table(title: str, headings: list[str], lines: list[list[str]]) -> Element:
    """Return a table: a line for each schedule, whose name is the first cell, with its colour."""
    body = []
    for mode, *cells in lines:
        swatch = element("span", class_="swatch", style=f"background:{plots.colour_of(mode)}")
        parts = [one for part in re.split("(?<=[:_])", mode) for one in (part, element("wbr"))]
        name = element("th", swatch, *parts[:-1], scope="row")
        body.append(element("tr", name, *(element("td", cell, class_=LOOKS.get(cell, "")) for cell in cells)))
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    return _scrolling(title, element("table", element("thead", head), element("tbody", *body)))


def _scrolling(title: str, content: Element) -> Element:
    """Return a part of the page that scrolls sideways by itself if the window is too narrow for it."""
    return element("div", content, class_="scroll", role="region", aria_label=title, tabindex=0)


def _facts(record: Record) -> Element:
    """Return a list of the names and values of a record's part, without what is not set."""
    pairs = ((element("dt", name), element("dd", value)) for name, value in _flat(record))
    return element("dl", *(element("div", *pair) for pair in pairs))


def _flat(record: Record) -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif value is not None and value is not False and value != "":
            yield name, "yes" if value is True else str(value)


def _is_profiled(result: dict[str, Any]) -> bool:
    """Older records name no profile in their settings."""
    return bool(result["settings"].get("profile")) or " --profile" in result.get("command", "")
