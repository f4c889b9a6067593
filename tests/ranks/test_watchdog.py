"""Ranks that die, fail, stall or never arrive, in real processes: the others name them, and none is left over."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from overlap_mtp.training.watchdog import EXIT_CODE

from watched_ranks import Scenario, run

Ends = dict[int, tuple[int, str]]
DEATHS = [
    *(Scenario("is killed", 2, others) for others in ("join", "reduce", "spin", "one works")),
    Scenario("is frozen", 2),
]
DEATHS_OF_HOLDER = [Scenario("is killed", 0, "reduce"), Scenario("is frozen", 0)]
RAISES = [Scenario("raises", 0), Scenario("raises", 1, "reduce")]
SEEMS_LOST = [Scenario("seems lost", 0), Scenario("seems lost", 1)]
SLEEPS = [Scenario("sleeps", 1, "follow"), Scenario("sleeps", 1, "spin ahead")]
ABSENT = [Scenario("is absent", 0), Scenario("is absent", 1)]
NO_FAULT = [Scenario("ends apart"), Scenario("pauses")]
AT_A_TIME = 4  # they mostly sleep


@pytest.fixture(scope="module")
def ends_of(tmp_path_factory) -> Iterator[Callable[[Scenario], Ends]]:
    """Return how the ranks of a scenario end. All scenarios begin with the first test."""
    everything = DEATHS + DEATHS_OF_HOLDER + RAISES + SEEMS_LOST + SLEEPS + ABSENT + NO_FAULT
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        ends = {one: pool.submit(run, one, tmp_path_factory.mktemp("ranks")) for one in everything}
        yield lambda scenario: ends[scenario].result()


def assert_all_name(found: Ends, odd: int, what: str, phase: str = "step 3") -> None:
    """Every rank but the odd one ends in a line that says `what`, and blames nobody else."""
    for rank in set(found) - {odd}:
        status, said = found[rank]
        line = next((line for line in said.splitlines() if "overlap_mtp: " in line), said)
        assert what in line
        assert f'; rank {rank} of {len(found)} was in "{phase}" and ends' in line
        assert status == (1 if "PeerError" in line else EXIT_CODE), said
        for other in set(found) - {odd}:
            assert not any(f"rank {other} {word}" in said for word in ("is gone", "failed", "has not"))


@pytest.mark.parametrize("scenario", DEATHS, ids=str)
def test_a_rank_that_dies_is_named(ends_of, scenario):
    found, phase = ends_of(scenario), "joining" if scenario.others == "join" else "step 3"
    assert_all_name(found, 2, "rank 2 is gone: no heartbeat for ", phase)
    assert_all_name(found, 2, f'the last in "{phase}"', phase)
    assert found[2][0] == (-signal.SIGKILL if scenario.fault == "is killed" else EXIT_CODE)


@pytest.mark.parametrize("scenario", DEATHS_OF_HOLDER, ids=str)
def test_the_rank_that_holds_the_store_is_named(ends_of, scenario):
    assert_all_name(ends_of(scenario), 0, "rank 0, which holds the store, is gone: no answer for ")
    assert_all_name(ends_of(scenario), 0, 'the last heartbeat in "step 3"')


@pytest.mark.parametrize("scenario", RAISES, ids=str)
def test_a_rank_that_raises_is_named_with_its_error(ends_of, scenario):
    found, odd = ends_of(scenario), scenario.odd
    assert_all_name(found, odd, f"rank {odd} failed in \"step 3\": ValueError('a batch of nonsense')")
    assert found[odd][0] == 1
    assert found[odd][1].strip().endswith("ValueError: a batch of nonsense")


@pytest.mark.parametrize("scenario", SEEMS_LOST, ids=str)
def test_a_rank_that_lost_nobody_is_to_blame_itself(ends_of, scenario):
    found, odd = ends_of(scenario), scenario.odd
    assert_all_name(found, odd, f"rank {odd} failed in \"step 3\": RuntimeError('Connection closed by peer')")
    assert "PeerError" not in found[odd][1]


@pytest.mark.parametrize("scenario", SLEEPS, ids=str)
def test_a_rank_that_never_arrives_is_named(ends_of, scenario):
    """It is in the phase that the others wait in, or in an earlier one."""
    found, phase = ends_of(scenario), "step 4" if scenario.others == "spin ahead" else "step 3"
    assert_all_name(found, 1, "rank 1 has not arrived after ", phase)
    assert_all_name(found, 1, 'it is still in "step 3"', phase)
    assert found[1][0] == EXIT_CODE
    assert "rank 1 has not arrived after " in found[1][1]


@pytest.mark.parametrize("scenario", ABSENT, ids=str)
def test_a_rank_that_is_never_started_is_named(ends_of, scenario):
    for status, said in ends_of(scenario).values():
        assert status == 1
        assert "PeerError: overlap_mtp: rank" in said
        assert f"rank {scenario.odd}, which never arrived" in said


@pytest.mark.parametrize("scenario", NO_FAULT, ids=str)
def test_ranks_that_end_apart_or_are_all_stopped_are_left_alone(ends_of, scenario):
    for status, said in ends_of(scenario).values():
        assert status == 0, said
        assert "overlap_mtp: " not in said
