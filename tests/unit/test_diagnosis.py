"""What watchdogs conclude, and when: all of them in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist

from overlap_mtp.training.snapshot import CheckpointError
from overlap_mtp.training.watchdog import LOST, Watchdog, _says, collectives_begun


@pytest.fixture
def watchdogs() -> Iterator[Callable[[int], tuple[list[Watchdog], dict[int, str]]]]:
    """Of the ranks of a run, all in this process, with what each would say at its end. Their deadline is 1 s."""
    made: list[Watchdog] = []

    def make(world_size: int) -> tuple[list[Watchdog], dict[int, str]]:
        store, said = dist.HashStore(), {}
        for rank in range(world_size):
            say = partial(said.setdefault, rank)
            made.append(Watchdog(store, rank, world_size, timedelta(seconds=1), on_verdict=say))
        return made, said

    yield make
    for one in reversed(made):  # no thread may be in the store when Python ends
        if one._talker.is_alive():
            one.__exit__(None, None, None)


def wait_for(condition: Callable[[], object], limit_s: float = 5) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_rank_that_is_furthest_behind_is_the_one_to_blame(watchdogs):
    """Rank 0 waits for rank 1, and both for rank 2."""
    made, said = watchdogs(3)
    for rank, watchdog in enumerate(made):
        watchdog.__enter__()
        for number in range(3 - rank):
            watchdog.phase(f"phase {number}")
    wait_for(lambda: len(said) == 3)
    for rank in range(3):
        assert 'rank 2 has not arrived after 1 s: it is still in "phase 0"; rank' in said[rank]


def test_within_a_phase_it_is_the_rank_that_has_done_least(watchdogs):
    """Of all that is followed together: 9, 7 and 6. Rank 0 waits for rank 1, and both for rank 2."""
    made, said = watchdogs(3)
    for watchdog, counts in zip(made, [(5, 4), (2, 5), (5, 1)], strict=True):
        watchdog.__enter__()
        watchdog.phase("a step")
        watchdog.follow(*[partial(int, count) for count in counts])
    wait_for(lambda: len(said) == 3)
    for rank in range(3):
        assert 'rank 2 has not arrived after 1 s: it is still in "a step"; rank' in said[rank]


def test_of_ranks_that_are_equally_far_all_are_named(watchdogs):
    made, said = watchdogs(3)
    for watchdog, count in zip(made, (1, 0, 0), strict=True):
        watchdog.__enter__()
        watchdog.follow(partial(int, count))
    wait_for(lambda: len(said) == 3)
    for rank in range(3):
        assert 'of ranks 1, 2, all in "start", one has not arrived after 1 s; rank' in said[rank]


def test_ranks_that_go_on_or_are_all_as_far_are_left_in_peace(watchdogs):
    """A rank that is behind is waited for only where this one stands still."""
    made, said = watchdogs(2)
    done = [0, 1]
    for rank, watchdog in enumerate(made):
        watchdog.__enter__()
        watchdog.follow(partial(done.__getitem__, rank))
    for count in range(1, 9):
        done[:] = count, count + 1
        time.sleep(0.25)
    done[0] += 1
    time.sleep(1.5)
    assert not said


def test_a_phase_may_allow_more_than_the_deadline(watchdogs):
    made, said = watchdogs(2)
    for count, watchdog in enumerate(made):
        watchdog.__enter__()
        watchdog.phase("saving", timedelta(seconds=2))
        watchdog.follow(partial(int, count))
    time.sleep(1.6)
    assert not said
    wait_for(lambda: len(said) == 2)
    assert all(
        'rank 0 has not arrived after 2 s: it is still in "saving"; rank' in one for one in said.values()
    )


def test_what_a_phase_allows_is_for_those_that_are_in_it(watchdogs):
    made, said = watchdogs(2)
    for watchdog in made:
        watchdog.__enter__()
        watchdog.phase("a step")
    made[0].phase("saving", timedelta(seconds=1000))
    wait_for(lambda: len(said) == 2)
    assert 'rank 1 has not arrived after 1 s: it is still in "a step"; rank 0 of 2 was in "saving"' in said[0]


class Group:
    """A process group, as far as a watchdog looks at it."""

    def _get_sequence_number_for_group(self) -> int:
        return 3


def test_a_group_that_is_followed_is_not_kept():
    watchdog, group = Watchdog(dist.HashStore(), 0, 1), Group()
    watchdog.follow(collectives_begun(group))
    assert watchdog._total() == 3
    del group
    assert watchdog._total() == 0


@pytest.mark.parametrize(("error", "is_lost"), [(RuntimeError, True), (CheckpointError, False)])
def test_an_error_of_ours_may_name_any_path(error, is_lost):
    """Also one that seems to speak of a connection."""
    assert _says(error("out/nccl_timeout is being written"), LOST) is is_lost


def test_a_rank_that_never_says_anything_has_the_whole_deadline(watchdogs):
    made, said = watchdogs(2)
    made[1].__enter__()
    time.sleep(0.5)  # twice what a rank may be silent for once it has spoken
    assert not said
    wait_for(lambda: said)
    assert 'rank 0 is gone: no sign of it for 1 s, the last was in "start"' in said[1]


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (SystemExit(0), "done"), (SystemExit(3), "failed"), (KeyboardInterrupt(), "failed")],
)
def test_the_others_learn_how_a_rank_ended(error, state):
    """Also one that ends while it is saying that it lives, as happens where there are many ranks."""
    store = dist.HashStore()

    class SlowWatchdog(Watchdog):
        def _exchange(self, client: dist.Store, beat: int) -> None:
            super()._exchange(client, beat)
            time.sleep(0.1)

    watchdog = SlowWatchdog(store, 1, 2, on_verdict=print)
    watchdog.__enter__()
    wait_for(lambda: store.check(["watchdog/1"]))
    watchdog.__exit__(type(error), error, None)
    assert state in json.loads(store.get("watchdog/1"))


def test_a_world_of_one_has_nobody_to_look_after():
    store = dist.HashStore()
    with Watchdog(store, 0, 1) as watchdog:
        watchdog.phase("alone")
    assert store.num_keys() == 0


def test_a_deadline_must_be_positive():
    with pytest.raises(ValueError, match=r"deadline and interval_s must be > 0 s, got 0\.0"):
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
