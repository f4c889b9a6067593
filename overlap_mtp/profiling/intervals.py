"""Unions of half-open time intervals [start, end), what they cover, and which range was open when. All in ns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Union = tuple[Ints, Ints]  # starts and ends of disjoint intervals, sorted

NONE = -1
FOREVER = np.iinfo(np.int64).max // 2  # the end of a range that was open when the capture stopped


def merge(start: Ints, end: Ints, gap: int = 0) -> Union:
    """Return the union of intervals, which may come in any order.

    Args:
        start, end: [n]. An interval that does not end after its start is dropped.
        gap: intervals at most this far apart become one.
    """
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
    """Return the total length of a union."""
    return int((union[1] - union[0]).sum())


def covered(union: Union, start: Ints, end: Ints) -> Ints:
    """Return how much of each interval [start, end) lies in the union."""
    return _covered_until(union, end) - _covered_until(union, start)


def _covered_until(union: Union, time: Ints) -> Ints:
    """Return how much of the union lies before each time."""
    starts, ends = (np.insert(times, 0, np.iinfo(np.int64).min // 2) for times in union)
    last = np.searchsorted(starts, time, side="right") - 1  # the last interval to begin
    total: Ints = np.cumsum(ends - starts)[last] - np.maximum(0, ends[last] - time)
    return total


class Nesting:
    """The ranges of several threads, and which of them encloses which.

    The ranges of one thread usually nest. If two of them cross (start/end ranges, or two domains), the one that
    began later counts as the inner one.

    Args:
        thread, start, end: [n].

    Attributes:
        parents: [n]. For each range the index of the one that encloses it, or NONE.
    """

    def __init__(self, thread: Ints, start: Ints, end: Ints) -> None:
        self._order = np.lexsort((-end, start, thread))  # of two with one start, the longer is the outer one
        self._thread, self._start = thread[self._order], start[self._order]
        self._end = np.append(end, FOREVER)  # at NONE: what is no range has not ended
        self.parents = np.full(start.size, NONE, np.int64)
        columns = (self._order, self._thread, self._start, end[self._order])
        enclosing: list[tuple[int, int, int]] = []
        for at, its_thread, its_start, its_end in zip(*(column.tolist() for column in columns), strict=True):
            while enclosing and (enclosing[-1][1] != its_thread or enclosing[-1][2] < its_start):
                enclosing.pop()
            if enclosing:
                self.parents[at] = enclosing[-1][0]
            enclosing.append((at, its_thread, its_end))

    def innermost(self, thread: Ints, time: Ints) -> Ints:
        """Return the index of the innermost range that is open at each time on each thread, or NONE."""
        found = np.full(time.size, NONE, np.int64)
        for one in np.unique(self._thread):
            begin, stop = np.searchsorted(self._thread, [one, one + 1])
            here = np.flatnonzero(thread == one)
            last = np.searchsorted(self._start[begin:stop], time[here], side="right") - 1
            found[here] = np.where(last < 0, NONE, self._order[begin + last])
        while (ended := np.flatnonzero(self._end[found] < time)).size:
            found[ended] = self.parents[found[ended]]
        return found
