"""Ranks that meet at the start, in threads of one process: who gives up, when, and what all of them say."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from overlap_mtp.training.rendezvous import PeerError, await_ranks


def meet(
    store: dist.Store, rank: int, world_size: int, begin_s: float, deadline_s: float
) -> tuple[float, str]:
    """(seconds that it took, what it said) of a rank that comes after `begin_s`."""
    time.sleep(begin_s)
    begin, said = time.monotonic(), ""
    try:
        await_ranks(store, rank, world_size, timedelta(seconds=deadline_s))
    except PeerError as error:
        said = str(error)
    return time.monotonic() - begin, said


def meet_all(arrivals: dict[int, tuple[float, float]], world_size: int) -> dict[int, tuple[float, str]]:
    store = dist.HashStore()
    with ThreadPoolExecutor(len(arrivals)) as pool:
        found = {rank: pool.submit(meet, store, rank, world_size, *when) for rank, when in arrivals.items()}
        return {rank: future.result() for rank, future in found.items()}


def test_ranks_that_all_come_go_on():
    found = meet_all({0: (0.0, 60.0), 1: (0.3, 60.0), 2: (0.1, 60.0)}, world_size=3)
    assert [said for _, said in found.values()] == ["", "", ""]


def test_all_give_up_with_the_first_and_name_the_same_rank():
    """However much longer another would have waited, and whoever holds the store."""
    for first, second in ((0, 2), (2, 0)):
        found = meet_all({first: (0.0, 6.0), second: (1.0, 60.0)}, world_size=3)
        for took_s, said in found.values():
            assert "at the start for rank 1, which never arrived" in said
            assert took_s < 30
            assert "may be missing" not in said


def test_several_absent_ranks_are_all_named():
    found = meet_all({0: (0.0, 1.0)}, world_size=4)
    assert "at the start for ranks 1, 2, 3, which never arrived" in found[0][1]


def test_a_rank_that_comes_too_late_hears_it():
    """The late one does not go on alone, and waits for nobody."""
    found = meet_all({1: (0.0, 1.0), 0: (2.0, 60.0)}, world_size=2)
    assert "for rank 0, which never arrived" in found[1][1]
    took_s, said = found[0]
    assert "came too late" in said
    assert took_s < 20
