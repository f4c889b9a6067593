"""What watchdogs conclude, and when: those of all ranks in one process, with a deadline of 1 s."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from overlap_mtp.training import watchdog as module
from overlap_mtp.training.access import read_signed
from overlap_mtp.training.checkpoint import CheckpointError
from overlap_mtp.training.rendezvous import PeerError
from overlap_mtp.training.watchdog import Watchdog, _is_lost_connection, collectives_begun


class Ranks:
    """The watchdogs of a run, and what each rank says at its end."""

    def __init__(self) -> None:
        self.said: dict[int, str] = {}
        self.made: list[Watchdog] = []

    def make(self, *counts: int) -> list[Watchdog]:
        """Return a watchdog for each rank. Each follows a counter that stands at the given number."""
        store = dist.HashStore()
        self.made = [Watchdog(store, rank, len(counts), timedelta(seconds=1)) for rank in range(len(counts))]
        for watchdog, count in zip(self.made, counts, strict=True):
            watchdog.heartbeat_timeout_s = 5.0  # on a busy machine, threads sleep for longer than 0.25 s
            watchdog.follow(lambda count=count: count)
        return self.made

    def end(self, message: str) -> None:
        self.said[int(re.search(r"; rank (\d+) of", message)[1])] = message

    def assert_all_say(self, text: str) -> None:
        wait_for(lambda: len(self.said) == len(self.made))
        assert all(f"overlap_mtp: {text}; rank" in one for one in self.said.values()), self.said


@pytest.fixture
def ranks(monkeypatch) -> Iterator[Ranks]:
    ranks = Ranks()
    monkeypatch.setattr(module, "end_process", ranks.end)
    yield ranks
    for one in reversed(ranks.made):  # no thread may be in the store when Python ends
        if one._threads[0].is_alive():
            one.__exit__(None, None, None)


def wait_for(condition: Callable[[], object], limit_s: float = 5) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("phases", "counts", "what"),
    [  # rank 0 waits for rank 1, and both wait for rank 2
        ((3, 2, 1), (0, 0, 0), 'rank 2 has not arrived after 1 s: it is still in "phase 0"'),
        ((1, 1, 1), (9, 7, 6), 'rank 2 has not arrived after 1 s: it is still in "phase 0"'),
        ((0, 0, 0), (1, 0, 0), 'one of ranks 1, 2 has not arrived after 1 s: it is still in "start"'),
    ],
)
def test_the_ranks_with_the_least_progress_are_named(ranks, phases, counts, what):
    for watchdog, number in zip(ranks.make(*counts), phases, strict=True):
        watchdog.follow(lambda number=number: 3 - number)  # the sum of both counters is what counts
        watchdog.__enter__()
        for phase in range(number):
            watchdog.phase(f"phase {phase}")
    ranks.assert_all_say(what)


def test_a_rank_whose_counter_raises_is_named(ranks):
    for watchdog in ranks.make(0, 0):
        watchdog.__enter__()
    ranks.made[1].follow({}.popitem)
    said = "a counter that it follows raised KeyError('popitem(): dictionary is empty')"
    ranks.assert_all_say(f'rank 1 failed in "start": {said}')


def test_ranks_that_advance_or_are_all_equally_far_are_left_alone(ranks):
    """A rank that is behind matters only if this rank stands still."""
    made, done = ranks.make(0, 0), [0, 1]
    for rank, watchdog in enumerate(made):
        watchdog.__enter__()
        watchdog.follow(lambda rank=rank: done[rank])
    for count in range(1, 6):
        done[:] = count, count + 1
        time.sleep(0.25)
    done[0] += 1
    time.sleep(1.2)
    assert not ranks.said


def test_a_phase_may_allow_more_than_the_deadline(ranks):
    for watchdog in ranks.make(0, 1):
        watchdog.__enter__()
        watchdog.phase("saving", timedelta(seconds=2))
    time.sleep(1.6)
    assert not ranks.said
    ranks.assert_all_say('rank 0 has not arrived after 2 s: it is still in "saving"')


def test_only_the_ranks_in_a_phase_may_use_what_it_allows(ranks):
    made = ranks.make(0, 0)
    for watchdog in made:
        watchdog.__enter__()
        watchdog.phase("a step")
    made[0].phase("saving", timedelta(seconds=1000))
    ranks.assert_all_say('rank 1 has not arrived after 1 s: it is still in "a step"')
    assert 'rank 0 of 2 was in "saving" and ends' in ranks.said[0]


def test_a_rank_that_gave_up_a_collective_names_the_rank_that_never_came(ranks):
    made = ranks.make(0, 1)
    for watchdog in made:
        watchdog.__enter__()
    time.sleep(0.5)
    with pytest.raises(PeerError, match=r"rank 0 has not arrived after 1 s.*rank 1 of 2 was in"):
        made[1].__exit__(None, RuntimeError("timed out waiting 500ms for recv operation"), None)


def test_a_rank_that_never_sent_a_heartbeat_has_the_whole_deadline(ranks):
    ranks.make(0, 0)[1].__enter__()
    time.sleep(0.5)  # twice the heartbeat timeout
    assert not ranks.said
    wait_for(lambda: ranks.said)
    assert 'rank 0 is gone: no heartbeat for 1 s, the last in "start"' in ranks.said[1]


class Group:
    """A process group, as far as a watchdog looks at it."""

    def _get_sequence_number_for_group(self) -> int:
        return 3


def test_a_group_that_is_followed_is_not_kept():
    group = Group()
    count = collectives_begun(group)
    assert count() == 3
    del group
    assert count() == 0


@pytest.mark.parametrize(("error", "is_lost"), [(RuntimeError, True), (CheckpointError, False)])
def test_an_error_of_ours_may_name_any_path(error, is_lost):
    """A path may look like a lost connection."""
    assert _is_lost_connection(error("out/nccl_timeout is being written")) is is_lost


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (SystemExit(0), "done"), (SystemExit(3), "failed"), (KeyboardInterrupt(), "failed")],
)
def test_the_others_learn_how_a_rank_ended(error, state):
    """Also if it ends while it sends a heartbeat, which is slow with many ranks."""
    store = dist.HashStore()

    class SlowWatchdog(Watchdog):
        def _exchange(self, client: dist.Store, beat: int) -> None:
            super()._exchange(client, beat)
            time.sleep(0.1)

    watchdog = SlowWatchdog(store, 1, 2)
    watchdog.__enter__()
    wait_for(lambda: store.check(["watchdog/1"]))
    watchdog.__exit__(type(error), error, None)
    assert state in json.loads(read_signed("1", store.get("watchdog/1")))


def test_a_world_of_one_has_nobody_to_watch_and_a_deadline_must_be_positive():
    store = dist.HashStore()
    with Watchdog(store, 0, 1) as watchdog:
        watchdog.phase("alone")
    assert store.num_keys() == 0
    with pytest.raises(ValueError, match=r"deadline must be > 0 s, got 0\.0"):
        Watchdog(dist.HashStore(), 0, 2, timedelta(0))


def test_a_phase_costs_next_to_nothing():
    watchdog = Watchdog(dist.HashStore(), 0, 1)
    best_s = float("inf")
    for _ in range(5):  # another job may have the core
        begin = time.perf_counter()
        for _ in range(2_000):
            watchdog.phase("a step")
        best_s = min(best_s, time.perf_counter() - begin)
    assert best_s < 2_000 * 2e-6
