"""Sets of time: unions of half-open intervals [start, end), and how much of an interval they cover. All in ns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Union = tuple[Ints, Ints]  # starts and ends of disjoint intervals, sorted


def merge(start: Ints, end: Ints, gap: int = 0) -> Union:
    """The union of intervals in any order. Empty ones vanish; those at most `gap` apart become one."""
    keep = end > start
    start, end = start[keep], end[keep]
    if not start.size:
        return start, end
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    first = np.flatnonzero(np.append(True, start[1:] > reach[:-1] + gap))
    last = np.append(first[1:], start.size) - 1
    return start[first], reach[last]


def length(union: Union) -> int:
    """How long all intervals of a union are together."""
    return int((union[1] - union[0]).sum())


def covered(union: Union, start: Ints, end: Ints) -> Ints:
    """How much of each interval [start, end) lies in the union."""
    return _covered_until(union, end) - _covered_until(union, start)


def _covered_until(union: Union, time: Ints) -> Ints:
    """How much of the union lies before each time."""
    starts, ends = union
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    index = np.searchsorted(starts, time, side="right")  # so many intervals have begun
    overshoot = np.zeros(time.size, np.int64)
    begun = index > 0
    overshoot[begun] = np.maximum(0, ends[index[begun] - 1] - time[begun])
    return before[index] - overshoot
