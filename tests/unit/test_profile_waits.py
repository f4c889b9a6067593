"""Waits for peers are told where a profile shows them, and never made up."""

import pytest

from overlap_mtp.profiling import read_profile

from handmade import Process, Span, Work, write_kineto, write_nsys
from small_traces import NCCL, event, group_of, grouped, report, trace, waits


def test_waits_are_of_one_process_group(tmp_path):
    files = [grouped(tmp_path, rank, [(10, 50 - 20 * rank)]) for rank in (0, 1)]
    files += [grouped(tmp_path, rank, [(10, 5)], "[2, 3]", "2") for rank in (2, 3)]
    assert waits(report(*files)) == [20, 0, 0, 0]
    assert waits(report(files[0], files[2])) == [None, None]


@pytest.mark.parametrize(
    "other",
    [
        {"collective": "broadcast"},
        {"world": 8},
        {"name": "9"},
        {"times": [(600, 40)]},
        {"times": [(10, 5)] * 2},
    ],
    ids=str,
)
def test_waits_are_not_made_up(tmp_path, other):
    files = [grouped(tmp_path, 0, [(10, 50)]), grouped(tmp_path, 1, **{"times": [(10, 40)], **other})]
    assert waits(report(*files)) == [None, None]


def test_waits_of_more_than_two_ranks_need_groups(tmp_path):
    processes = [
        Process(rank, [Span(f"trunk r{rank}", 0, 5)], [Work(NCCL, 1, 10, 20 + rank)], device=rank)
        for rank in range(4)
    ]
    assert waits(report(write_nsys(tmp_path / "a", processes))) == [None] * 4
    assert waits(report(write_nsys(tmp_path / "b", processes[:2]))) == [0, 1]


ALL = "[0, 1, 2, 3]"


def test_waits_need_all_ranks_of_the_group_once(tmp_path):
    files = [grouped(tmp_path, rank, [(10, 50 - rank)], ALL) for rank in range(4)]
    assert waits(report(*files)) == [3, 2, 1, 0]
    assert waits(report(*files[:3])) == [None] * 3
    twice = [event(NCCL, 10, 50, 8, device, **group_of()) for device in (0, 1)]
    files = [grouped(tmp_path, 1, [(10, 50)]), trace(tmp_path / "rank0.json", *twice, world=4)]
    assert waits(report(*files)) == [None] * 3


def exchanging(folder, rank):
    """A kernel of the exchange, with a group of four ranks."""
    events = [
        event(f"send-recv r{rank}", 0, 5, category="user_annotation"),
        event("launch", 1, 1, category="cuda_runtime", correlation=9),
        event(NCCL, 10, 50 - rank, 8, rank, correlation=9, **group_of(ALL, collective="all_to_all")),
    ]
    return trace(folder / f"rank{rank}.json", *events, rank=rank, world=4)


def test_neighbours_in_a_group_of_more_wait_for_each_other_alone(tmp_path):
    """An exchange, a send or a receive has other participants than the group has ranks."""
    files = [grouped(tmp_path, rank, [(10, 50 - rank)], ALL, collective="send") for rank in range(4)]
    assert waits(report(*files)) == [None] * 4
    assert waits(report(*(exchanging(tmp_path, rank) for rank in range(4)))) == [None] * 4


@pytest.mark.parametrize(
    ("step", "late", "expected"),
    [("step prefetch", 0, 0), ("step prefetch", 500, None), ("other", 0, None)],
)
def test_kernels_of_one_step_that_ran_apart_waited_for_nothing(tmp_path, step, late, expected):
    processes = []
    for rank, at in ((0, 0), (1, late)):
        spans = [Span(f"{step} r{rank}", at, at + 100), Span(f"send-recv r{rank}", at, at + 5)]
        work = [Work("put", at + 1, at + 10 + 30 * rank, at + 20 + 30 * rank)]
        processes.append(Process(rank, spans, work, device=rank))
    assert waits(report(write_nsys(tmp_path / "a", processes))) == [expected] * 2


@pytest.mark.parametrize(("late", "expected"), [(0, [0, 0, 0, 0]), (200, [None] * 4)])
def test_kernels_in_several_files_that_ran_apart_need_others_that_met(tmp_path, late, expected):
    """The clock of another host may be off, by less than a step takes."""
    files = []
    for rank, off in ((0, 0), (1, late)):
        spans = [Span(f"step prefetch r{rank}", off, off + 900), Span(f"send-recv r{rank}", off, off + 5)]
        put = Work("put", off + 1, off + 10 + 90 * rank, off + 20 + 90 * rank)
        reduce = Work(NCCL, off + 6, off + 300, off + 390)
        files.append(
            write_kineto(tmp_path / f"{rank}.json", Process(rank, spans, [put, reduce], device=rank))
        )
    assert waits(report(*files)) == expected


def reducing(rank, *spans, name=NCCL):
    spans = spans or [Span(f"trunk r{rank}", 0, 5)]
    return Process(rank, spans, [Work(name, 1, 10, 20 + rank)], device=rank)


@pytest.mark.parametrize(
    "other",
    [
        reducing(1, Span("depth 1 r1", 0, 5)),
        reducing(1, Span("step sync r1", 0, 9), Span("trunk r1", 0, 5)),
        reducing(1, name="ncclDevKernel_Broadcast"),
    ],
    ids=["range", "step", "kernel"],
)
def test_without_groups_waits_are_of_one_kernel_in_one_range_and_step(tmp_path, other):
    assert waits(report(write_nsys(tmp_path / "a", [reducing(0), other]))) == [None, None]


def test_two_ranks_without_groups_must_be_each_others_only_peers(tmp_path):
    third = reducing(2, name="ncclDevKernel_Broadcast")
    assert waits(report(write_nsys(tmp_path / "a", [reducing(0), reducing(1), third]))) == [None] * 3
    for world, expected in ((2, 0), (4, None)):
        files = [
            trace(tmp_path / f"{rank}.json", event(NCCL, 5, 9, 8, rank), rank=rank, world=world)
            for rank in (0, 1)
        ]
        assert waits(report(*files)) == [expected] * 2


def test_times_on_different_clocks_tell_no_wait(tmp_path):
    files = [write_nsys(tmp_path / str(rank), [reducing(rank)]) for rank in (0, 1)]
    assert waits(report(*files)) == [None, None]


def test_abbreviated_ranks_of_a_group_are_not_known(tmp_path):
    """torch shortens the list of a large group."""
    path = trace(tmp_path / "a.json", event(NCCL, 2, 3, **group_of("[0, 1, 2, ..., 63]")))
    assert read_profile(path).groups[0].ranks == ()
