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


def merge_each(group: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the union of the intervals of each group, as `merge` does, in one pass over all groups.

    Args:
        group: [n]. Not negative.
        start, end: [n].

    Returns:
        Group, start and end of each interval of the unions, sorted by group and start.
    """
    keep = end > start
    order = np.lexsort((start[keep], group[keep]))
    group, start, end = group[keep][order], start[keep][order], end[keep][order]
    # The running maximum of ends must begin again in each group: the ranks of ends leave room for the group's number.
    ends, rank = np.unique(end, return_inverse=True)
    reach = np.maximum.accumulate(group * ends.size + rank)
    is_first = np.ones(group.size, bool)
    is_first[1:] = (group[1:] != group[:-1]) | (start[1:] > ends[reach[:-1] % max(1, ends.size)])
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], group.size)[: first.size] - 1
    return group[first], start[first], ends[reach[last] % max(1, ends.size)]


def sum_each(group: Ints, values: Ints, num_groups: int) -> Ints:
    """Return the sum of the values of each group, as exact integers."""
    total = np.zeros(num_groups, np.int64)
    np.add.at(total, group, values)
    return total


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
        self.parents = np.full(start.size, NONE, np.int64)
        columns = (self._order, self._thread, self._start, end[self._order])
        enclosing: list[tuple[int, int, int]] = []
        for at, its_thread, its_start, its_end in zip(*(column.tolist() for column in columns), strict=True):
            while enclosing and (enclosing[-1][1] != its_thread or enclosing[-1][2] < its_start):
                enclosing.pop()
            if enclosing:
                self.parents[at] = enclosing[-1][0]
            enclosing.append((at, its_thread, its_end))
        self._ancestors = self._jumps(end)

    def innermost(self, thread: Ints, time: Ints) -> Ints:
        """Return the index of the innermost range that is open at each time on each thread, or NONE."""
        found = self._last_begun(thread, time)
        # The furthest jump first: over ranges that have all ended.
        for parents, reach in reversed(self._ancestors):
            ended = reach[found] < time
            found = np.where(ended, parents[found], found)
        return found

    def _last_begun(self, thread: Ints, time: Ints) -> Ints:
        """For each time the last range that has begun on the thread, or NONE."""
        threads, times = np.concatenate([self._thread, thread]), np.concatenate([self._start, time])
        is_query = np.arange(threads.size) >= self._thread.size
        order = np.lexsort((is_query, times, threads))  # stable: ranges with one start keep their order
        position = np.where(order < self._thread.size, np.arange(order.size), NONE)
        last = order[np.maximum.accumulate(position)]
        known = (np.maximum.accumulate(position) != NONE) & (threads[last] == threads[order])
        begun = np.full(threads.size, NONE, np.int64)
        begun[order] = np.where(known, np.append(self._order, NONE)[np.where(known, last, NONE)], NONE)
        return begun[self._thread.size :]

    def _jumps(self, end: Ints) -> list[tuple[Ints, Ints]]:
        """For each k the 2^k-th ancestor of each range, and the latest end of the ranges before that ancestor.

        The last entry of both is for NONE: what is no range has not ended.
        """
        parents, reach = np.append(self.parents, NONE), np.append(end, FOREVER)
        jumps = [(parents, reach)]
        while (parents != NONE).any():
            parents, reach = parents[parents], np.maximum(reach, reach[parents])
            jumps.append((parents, reach))
        return jumps
