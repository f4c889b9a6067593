"""Which range was open on a thread at a time."""

from __future__ import annotations

import numpy as np

from overlap_mtp.profiling.intervals import Ints

NONE = -1


class Nesting:
    """Ranges of several threads, and which of them encloses which.

    Ranges of one thread nest as a rule. Where two of them cross (start/end ranges, two domains), the one that began
    later counts as the inner one.
    """

    def __init__(self, thread: Ints, start: Ints, end: Ints) -> None:
        self._order = np.lexsort((-end, start, thread))  # at one start, the longer range is the outer one
        self._thread, self._start, self._end = thread[self._order], start[self._order], end[self._order]
        self._parent = self._find_parents()

    def innermost(self, thread: Ints, time: Ints) -> Ints:
        """For each (thread, time): the range, as an index into what the ranges were made from, or NONE."""
        at = np.full(time.size, NONE, np.int64)
        for one in np.unique(self._thread):
            begin, end = np.searchsorted(self._thread, [one, one + 1])
            here = np.flatnonzero(thread == one)
            found = np.searchsorted(self._start[begin:end], time[here], side="right") - 1
            at[here] = np.where(found < 0, NONE, found + begin)
        while True:  # the last to begin may have ended: then one that encloses it
            ended = np.flatnonzero(at != NONE)
            ended = ended[self._end[at[ended]] < time[ended]]
            if not ended.size:
                return self._given(at)
            at[ended] = self._parent[at[ended]]

    def parents(self) -> Ints:
        """For each range, in the order that they were given: the one that encloses it, or NONE."""
        parents = np.empty(self._order.size, np.int64)
        parents[self._order] = self._given(self._parent)
        return parents

    def _given(self, at: Ints) -> Ints:
        return np.where(at == NONE, NONE, self._order[at]) if self._order.size else at

    def _find_parents(self) -> Ints:
        parent = np.full(self._start.size, NONE, np.int64)
        stack: list[int] = []
        thread = None
        ends = self._end.tolist()
        for i, (its_thread, start) in enumerate(
            zip(self._thread.tolist(), self._start.tolist(), strict=True)
        ):
            if its_thread != thread:
                thread, stack = its_thread, []
            while stack and ends[stack[-1]] < start:
                stack.pop()
            if stack:
                parent[i] = stack[-1]
            stack.append(i)
        return parent
