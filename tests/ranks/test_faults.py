"""What goes wrong after the agreement: other plans, absent ranks, changes of mind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_roller
from overlap_mtp.exchange.group import exchange_group_of

from cases import (
    EXCHANGING,
    NUM_DEPTHS,
    ODD_RANK,
    PACKED,
    error_of,
    local_to,
    other_dtype,
    packed,
    wrong_rolls,
)
from rank_pool import RankPool

TIMEOUT_S = 4
SLACK_S = 6


@pytest.fixture(scope="module")
def short_pool() -> Iterator[RankPool]:
    """Three ranks on which each test makes a group of its own, which it may break."""
    with RankPool(3, timeout_s=30) as ranks:
        yield ranks


def fresh_group(world: dist.ProcessGroup, timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup:
    """A cp group with its exchange group made."""
    group = dist.new_group(list(range(world.size())), timeout=timedelta(seconds=timeout_s))
    assert group is not None
    assert exchange_group_of(group).process_group is not None
    return group


def plans_differ(world: dist.ProcessGroup, schedule: str, kind: str) -> tuple[str, str]:
    """What the join of a good batch raises, then that of one whose documents are others on the last rank."""
    group = fresh_group(world, timeout_s=30)
    last, unit = group.size() - 1, 2 * group.size()
    bounds = [[0, 2 * unit, 6 * unit], [0, 3 * unit, 6 * unit]]
    layouts = [SequenceLayout.packed(one, group.size(), kind) for one in bounds]
    roller = make_roller(schedule, group, NUM_DEPTHS)
    first = error_of(lambda: roller.start(local_to(group, schedule, layouts[0]), layouts[0]).at(1))
    mine = layouts[group.rank() == last]
    second = error_of(lambda: roller.start(local_to(group, schedule, mine), mine).at(1))
    return first, second


def assert_sees_another_plan(error: str, *peers: int) -> None:
    assert error.startswith("RuntimeError: "), error
    assert "plan" in error
    assert any(f"rank {peer}" in error for peer in peers), error


@pytest.mark.parametrize("schedule", PACKED)
def test_plans_that_differ_raise_where_they_can_be_seen(short_pool: RankPool, schedule):
    """With three zigzag ranks, 2 hears from 1, 1 from 0 and 2, and 0 from 1 (and from 2 by depth 2)."""
    results = short_pool.run(plans_differ, 3, schedule, "zigzag")
    assert [first for first, _ in results] == ["nothing"] * 3
    _, of_middle, of_last = (second for _, second in results)
    assert_sees_another_plan(of_middle, 2)
    assert_sees_another_plan(of_last, 0, 1)


@pytest.mark.parametrize("schedule", PACKED)
def test_contiguous_plans_that_differ_raise_at_the_receiver(short_pool: RankPool, schedule):
    """Contiguous ranks hear from those above alone: the last one hears from nobody and cannot know."""
    results = short_pool.run(plans_differ, 3, schedule, "contiguous")
    assert [first for first, _ in results] == ["nothing"] * 3
    _, of_middle, of_last = (second for _, second in results)
    assert_sees_another_plan(of_middle, 2)
    assert of_last == "nothing"


def timed_error(call: Callable[[], object]) -> tuple[str, float]:
    begin = time.monotonic()
    return error_of(call), time.monotonic() - begin


def stay_away(world: dist.ProcessGroup, schedule: str) -> tuple[str, float]:
    """Rank 1, a neighbour of both others, takes part in the first microbatch and not in the second."""
    group = fresh_group(world)
    layout = packed(group.size())
    batch = local_to(group, schedule, layout)
    roller = make_roller(schedule, group, NUM_DEPTHS)
    assert wrong_rolls(roller.start(batch, layout), layout, group.rank()) == []
    if group.rank() == ODD_RANK:
        return "away", 0.0
    return timed_error(lambda: roller.start(batch, layout).at(1))


def assert_names_the_exchange(error: str, seconds: float, *words: str) -> None:
    assert error.startswith("RuntimeError: "), error
    assert "overlap_mtp" in error
    for word in words:
        assert word in error, error
    assert seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("schedule", EXCHANGING)
def test_a_rank_that_never_comes_ends_in_an_error_that_names_the_exchange(short_pool: RankPool, schedule):
    results = short_pool.run(stay_away, 3, schedule)
    what = "roll of document" if schedule == "sync" else "exchange"
    for rank in (0, 2):
        assert_names_the_exchange(*results[rank], what, f"rank {rank}")


def miss_the_agreement(world: dist.ProcessGroup) -> tuple[str, float]:
    group = fresh_group(world)
    layout = packed(group.size())
    if group.rank() == ODD_RANK:
        return "away", 0.0
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    return timed_error(lambda: roller.start(local_to(group, "prefetch", layout), layout))


def test_a_rank_that_misses_the_agreement_is_an_error_that_names_it(short_pool: RankPool):
    results = short_pool.run(miss_the_agreement, 3)
    for rank in (0, 2):
        assert_names_the_exchange(*results[rank], "agreement", "prefetch")


def come_with_another_dtype(world: dist.ProcessGroup) -> tuple[str, float]:
    """After the agreement one rank wants another, the others exchange: neither can know, both time out."""
    group = fresh_group(world)
    layout = packed(group.size())
    batch = local_to(group, "prefetch", layout)
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    assert wrong_rolls(roller.start(batch, layout), layout, group.rank()) == []
    if group.rank() == ODD_RANK:
        batch, layout = other_dtype(batch, layout)
    return timed_error(lambda: roller.start(batch, layout).at(1))


def test_a_rank_that_changes_its_batch_alone_ends_in_a_named_error(short_pool: RankPool):
    results = short_pool.run(come_with_another_dtype, 3)
    for rank in range(3):
        assert_names_the_exchange(*results[rank], "agreement" if rank == ODD_RANK else "exchange")


def come_with_what_was_agreed_before(world: dist.ProcessGroup) -> tuple[str, float]:
    """All agreed on one kind of batch, then on another; then one rank alone goes back to the first."""
    group = fresh_group(world)
    layout = packed(group.size())
    few, many = (local_to(group, "prefetch", layout, rows=rows) for rows in (1, 2))
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    for batch in (few, many):
        roller.start(batch, layout).at(1)
    return timed_error(lambda: roller.start(few if group.rank() == ODD_RANK else many, layout).at(1))


def test_a_rank_that_goes_back_alone_ends_in_a_named_error(short_pool: RankPool):
    """Messages of the two kinds differ in length, which would end a gloo process without a word."""
    results = short_pool.run(come_with_what_was_agreed_before, 3)
    for rank in range(3):
        assert_names_the_exchange(*results[rank], "agreement" if rank == ODD_RANK else "exchange")
