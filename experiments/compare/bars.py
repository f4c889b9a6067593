"""The step times of a comparison as bars with their intervals, in SVG.

All positions across are percentages of the drawing's width, so that the bars stretch and the text keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from compare.columns import BASELINE, NARROW, RATIO
from compare.markup import element
from harness.plots import colour_of

ROW, BAR, TOP, AXIS = (
    46,
    16,
    22,
    30,
)  # pixels: height of a row and of its bar, where the bar begins, height of the axis
STEPS = (0.1, 0.2, 0.25, 0.5, 1.0, 2.0)  # between the marks of the axis, times a power of ten
MOST_MARKS = 6


def bars_of(rows: dict[str, Any]) -> Element:
    """Return a bar for each schedule: its step over the baseline's, with the 95 % interval as a line.

    Args:
        rows: of the record, by schedule.
    """
    labels = {mode: NARROW[RATIO](mode, row) for mode, row in rows.items()}
    ratios = {mode: row["ratio"] for mode, row in rows.items()}
    most = max(1.0, *(value for one in ratios.values() for value in one.values())) * 1.03
    height = ROW * len(rows)

    def across(value: float) -> str:
        return f"{100 * min(max(value / most, 0), 1):.2f}%"

    one = across(1)
    parts = [element("line", x1=one, x2=one, y1=0, y2=height + 6, class_="one")]
    for at, (mode, ratio) in enumerate(ratios.items()):
        parts.extend(
            _bar(mode, labels[mode], [across(ratio[part]) for part in ("value", "low", "high")], at * ROW)
        )
    parts.append(element("line", x1=0, x2="100%", y1=height, y2=height, class_="axis"))
    for mark in _marks(most):
        anchor = "start" if mark == 0 else "middle"
        parts.append(
            element("line", x1=across(mark), x2=across(mark), y1=height, y2=height + 5, class_="axis")
        )
        parts.append(
            element("text", f"{mark:g}", x=across(mark), y=height + 20, text_anchor=anchor, class_="mark")
        )
    return element(
        "svg",
        element("title", "Step time over that without any exchange", id="bars-title"),
        element("desc", "; ".join(f"{mode}: {label}" for mode, label in labels.items()), id="bars-desc"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_labelledby="bars-title bars-desc",
        width="100%",
        height=height + AXIS,
    )


def _bar(mode: str, label: str, ends: list[str], top: int) -> Iterator[Element]:
    """Yield a bar, its name on the left and its figure on the right above it, and the interval across its end."""
    value, low, high = ends
    middle = top + TOP + BAR / 2
    yield element("text", mode, x=0, y=top + 16, class_="name")
    yield element("text", label, x="100%", y=top + 16, text_anchor="end")
    yield element("rect", x=0, y=top + TOP, width=value, height=BAR, fill=colour_of(mode), class_="bar")
    if mode == BASELINE:
        return
    for look in ("halo", "interval"):
        yield element("line", x1=low, x2=high, y1=middle, y2=middle, class_=look)
        for end in (low, high):
            yield element("line", x1=end, x2=end, y1=middle - 5, y2=middle + 5, class_=look)


def _marks(most: float) -> list[float]:
    """Return the marks of an axis from 0: few, round, and 1 among them or between two."""
    power = 10 ** np.floor(np.log10(most))
    step = next(one * power for one in STEPS if most / (one * power) <= MOST_MARKS)
    return [float(step * n) for n in range(int(most / step) + 1)]
