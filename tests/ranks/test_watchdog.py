"""Ranks that die, fail, stall or never arrive, in real processes: the others name them, and none is left over."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from overlap_mtp.training.watchdog import EXIT_CODE

from watched_ranks import Scenario, run

Ends = dict[int, tuple[int, str]]
GONE = r'rank 2 is gone: no heartbeat for \d+ s, the last in "step 3"'
NO_STORE = r'rank 0, which holds the store, is gone: no answer for \d+ s.*, the last heartbeat in "step 3"'
NONSENSE = r"""failed in "step 3": ValueError\('a batch of nonsense'\)"""
CLOSED = r"""failed in "step 3": RuntimeError\('Connection closed by peer'\)"""
LATE = r'rank 1 has not arrived after \d+ s: it is still in "step 3"'
# What the others say, the phase that they are in, and how the odd rank ends: its status and a part of what it says.
FAULTS = {
    Scenario("is killed", 2, "join"): (GONE.replace("step 3", "joining"), "joining", -signal.SIGKILL, ""),
    Scenario("is killed", 2, "reduce"): (GONE, "step 3", -signal.SIGKILL, ""),
    Scenario("is killed", 2, "spin"): (GONE, "step 3", -signal.SIGKILL, ""),
    Scenario("is killed", 2, "one works"): (GONE, "step 3", -signal.SIGKILL, ""),
    Scenario("is frozen", 2): (GONE, "step 3", EXIT_CODE, ""),
    Scenario("is killed", 0, "reduce"): (NO_STORE, "step 3", -signal.SIGKILL, ""),
    Scenario("is frozen", 0): (NO_STORE, "step 3", EXIT_CODE, ""),
    Scenario("raises", 0): (f"rank 0 {NONSENSE}", "step 3", 1, "ValueError: a batch of nonsense"),
    Scenario("raises", 1, "reduce"): (f"rank 1 {NONSENSE}", "step 3", 1, "ValueError: a batch of nonsense"),
    # It lost nobody, so it is to blame itself.
    Scenario("seems lost", 0): (f"rank 0 {CLOSED}", "step 3", 1, "RuntimeError: Connection closed by peer"),
    Scenario("seems lost", 1): (f"rank 1 {CLOSED}", "step 3", 1, "RuntimeError: Connection closed by peer"),
    Scenario("sleeps", 1, "follow"): (LATE, "step 3", EXIT_CODE, "rank 1 has not arrived after "),
    Scenario("sleeps", 1, "spin ahead"): (LATE, "step 4", EXIT_CODE, "rank 1 has not arrived after "),
}
ABSENT = [Scenario("is absent", 0), Scenario("is absent", 1)]
NO_FAULT = [Scenario("ends apart"), Scenario("pauses")]
AT_A_TIME = 4  # they mostly sleep


@pytest.fixture(scope="module")
def ends_of(tmp_path_factory) -> Iterator[Callable[[Scenario], Ends]]:
    """Return how the ranks of a scenario end. All scenarios begin with the first test."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        everything = [*FAULTS, *ABSENT, *NO_FAULT]
        ends = {one: pool.submit(run, one, tmp_path_factory.mktemp("ranks")) for one in everything}
        yield lambda scenario: ends[scenario].result()


@pytest.mark.parametrize("scenario", FAULTS, ids=str)
def test_all_ranks_name_the_one_at_fault(ends_of, scenario):
    found, odd = ends_of(scenario), scenario.odd
    what, phase, odd_status, odd_says = FAULTS[scenario]
    status, said = found.pop(odd)
    assert status == odd_status
    assert odd_says in said
    assert "PeerError" not in said
    for rank, (status, said) in found.items():
        line = next((line for line in said.splitlines() if "overlap_mtp: " in line), said)
        assert re.search(rf'overlap_mtp: {what}; rank {rank} of 3 was in "{phase}" and ends', line), said
        assert status == (1 if "PeerError" in line else EXIT_CODE), said
        for other in found:
            assert not any(f"rank {other} {word}" in said for word in ("is gone", "failed", "has not"))


@pytest.mark.parametrize("scenario", ABSENT, ids=str)
def test_a_rank_that_is_never_started_is_named(ends_of, scenario):
    for status, said in ends_of(scenario).values():
        assert status == 1
        assert re.search(rf"PeerError: overlap_mtp: .* rank {scenario.odd}, which never arrived", said), said


@pytest.mark.parametrize("scenario", NO_FAULT, ids=str)
def test_ranks_that_end_apart_or_are_all_stopped_are_left_alone(ends_of, scenario):
    for status, said in ends_of(scenario).values():
        assert status == 0, said
        assert "overlap_mtp: " not in said
