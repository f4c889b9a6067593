"""Ranks meet at the start, in threads of one process: when they give up, and which rank they name."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from overlap_mtp.training.rendezvous import PeerError, await_ranks


def meet_all(arrivals: dict[int, tuple[float, float]], world_size: int) -> dict[int, str]:
    """Return the error message of each rank ("" if it has none), given its (arrival, deadline) in seconds."""
    store = dist.HashStore()

    def meet(rank: int) -> str:
        arrival_s, deadline_s = arrivals[rank]
        time.sleep(arrival_s)
        try:
            await_ranks(store, rank, world_size, timedelta(seconds=deadline_s))
        except PeerError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(arrivals)) as pool:
        return dict(zip(arrivals, pool.map(meet, arrivals), strict=True))


def test_ranks_that_all_arrive_continue():
    assert meet_all({0: (0, 60), 1: (0.3, 60), 2: (0.1, 60)}, world_size=3) == {0: "", 1: "", 2: ""}


def test_all_give_up_with_the_first_and_name_the_same_ranks():
    """A longer deadline of another rank does not matter, nor which rank holds the store."""
    for first, second in ((0, 2), (2, 0)):
        begin = time.monotonic()
        said = meet_all({first: (0, 3), second: (0.5, 60)}, world_size=5)
        assert time.monotonic() - begin < 10
        for rank in (first, second):
            assert (
                f"rank {rank} of 5 waited at the start for ranks 1, 3, 4, which never arrived" in said[rank]
            )


def test_a_rank_that_arrives_too_late_is_told_at_once():
    begin = time.monotonic()
    said = meet_all({1: (0, 2), 0: (3, 60)}, world_size=2)
    assert "for rank 0, which never arrived" in said[1]
    assert "came too late" in said[0]
    assert time.monotonic() - begin < 10
