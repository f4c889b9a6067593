"""Unions, cover and nesting against counts of single nanoseconds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from overlap_mtp.profiling.intervals import NONE, Nesting, covered, length, merge

TIMES = st.integers(0, 60)
INTERVALS = st.lists(st.tuples(TIMES, st.integers(-2, 20)), max_size=12)
RANGES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 20)), max_size=10)
CALLS = st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 55)), max_size=10)


def columns(intervals):
    start, size = np.array(intervals, np.int64).reshape(-1, 2).T
    return start, start + size


def moments(start, end):
    return {moment for a, b in zip(start.tolist(), end.tolist(), strict=True) for moment in range(a, b)}


@given(INTERVALS, st.integers(0, 5))
def test_a_union_holds_each_moment_once(intervals, gap):
    start, end = columns(intervals)
    union, near = merge(start, end), merge(start, end, gap)
    assert moments(*union) == moments(start, end) <= moments(*near)
    assert length(union) == len(moments(start, end))
    assert length(near) <= length(union) + gap * max(0, union[0].size - 1)
    for starts, ends, apart in ((*union, 0), (*near, gap)):  # disjoint, sorted, and not merely touching
        assert (starts[1:] > ends[:-1] + apart).all()
        assert (ends > starts).all()


@given(INTERVALS, INTERVALS)
def test_cover_counts_the_shared_moments(communication, compute):
    start, end = columns([(start, max(0, size)) for start, size in communication])
    union, compute_moments = merge(*columns(compute)), moments(*columns(compute))
    expected = [len(compute_moments & set(range(a, b))) for a, b in zip(start, end, strict=True)]
    assert covered(union, start, end).tolist() == expected
    assert covered(union, *merge(start, end)).sum() == len(compute_moments & moments(start, end))


@given(RANGES, CALLS)
def test_the_innermost_range_is_the_last_to_begin_that_holds_the_call(ranges, calls):
    thread, start, size = np.array(ranges, np.int64).reshape(-1, 3).T
    end = start + size
    nesting = Nesting(thread, start, end)
    found = nesting.innermost(*np.array(calls, np.int64).reshape(-1, 2).T)
    for at, (its_thread, moment) in zip(found.tolist(), calls, strict=True):
        holding = [i for i in range(len(ranges)) if thread[i] == its_thread and start[i] <= moment <= end[i]]
        assert (at in holding) == bool(holding)
        if holding:
            assert start[at] == max(start[i] for i in holding)
            assert end[at] == min(end[i] for i in holding if start[i] == start[at])
        else:
            assert at == NONE
    for child, parent in enumerate(nesting.parents.tolist()):
        if parent != NONE:
            assert thread[parent] == thread[child]
            assert start[parent] <= start[child] <= end[parent]
