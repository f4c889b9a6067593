"""Unions, cover and nesting against counts of single nanoseconds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from overlap_mtp.profiling.intervals import NONE, Nesting, covered, length, merge

TIMES = st.integers(0, 60)
INTERVALS = st.lists(st.tuples(TIMES, st.integers(-2, 20)), max_size=12)


def columns(intervals):
    pairs = np.array([(start, start + size) for start, size in intervals], np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def moments(start, end):
    return {moment for a, b in zip(start.tolist(), end.tolist(), strict=True) for moment in range(a, b)}


@given(INTERVALS)
def test_a_union_holds_each_moment_once(intervals):
    start, end = columns(intervals)
    union = merge(start, end)
    assert moments(*union) == moments(start, end)
    assert length(union) == len(moments(start, end))
    assert (union[0][1:] > union[1][:-1]).all()  # disjoint, sorted, and not merely touching
    assert (union[1] > union[0]).all()


@given(INTERVALS, INTERVALS)
def test_cover_counts_the_shared_moments(communication, compute):
    start, end = columns(communication)
    keep = end >= start
    start, end = start[keep], end[keep]
    compute_moments = moments(*columns(compute))
    expected = [len(compute_moments & set(range(a, b))) for a, b in zip(start, end, strict=True)]
    union = merge(*columns(compute))
    assert covered(union, start, end).tolist() == expected
    shared = covered(union, *merge(start, end)).sum()
    assert shared == len(compute_moments & moments(start, end))


@given(INTERVALS, st.integers(0, 5))
def test_a_gap_joins_what_is_near(intervals, gap):
    near = merge(*columns(intervals), gap=gap)
    plain = merge(*columns(intervals))
    assert moments(*plain) <= moments(*near)
    assert (near[0][1:] > near[1][:-1] + gap).all()
    assert length(near) <= length(plain) + gap * max(0, plain[0].size - 1)


RANGES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 20)), max_size=10)
CALLS = st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 55)), max_size=10)


@given(RANGES, CALLS)
def test_the_innermost_range_is_the_last_to_begin_that_holds_the_call(ranges, calls):
    thread, start, size = np.array(ranges, np.int64).reshape(-1, 3).T
    end = start + size
    called_thread, time = np.array(calls, np.int64).reshape(-1, 2).T
    found = Nesting(thread, start, end).innermost(called_thread, time)
    for at, (its_thread, moment) in zip(found, calls, strict=True):
        holding = [i for i in range(len(ranges)) if thread[i] == its_thread and start[i] <= moment <= end[i]]
        if not holding:
            assert at == NONE
        else:
            assert at in holding
            assert start[at] == max(start[i] for i in holding)
            assert end[at] == min(end[i] for i in holding if start[i] == start[at])


@given(RANGES)
def test_the_parent_of_a_range_encloses_its_beginning(ranges):
    thread, start, size = np.array(ranges, np.int64).reshape(-1, 3).T
    end = start + size
    for child, parent in enumerate(Nesting(thread, start, end).parents.tolist()):
        if parent != NONE:
            assert thread[parent] == thread[child]
            assert start[parent] <= start[child] <= end[parent]
