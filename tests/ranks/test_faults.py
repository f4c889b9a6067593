"""What goes wrong after the agreement: other plans, absent ranks, changes of mind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_roller

from cases import (
    EXCHANGING,
    NUM_DEPTHS,
    ODD_RANK,
    PACKED,
    Microbatch,
    error_of,
    replace_labels,
)
from rank_pool import TIMEOUT_S, RankPool, fresh_group
from strategies import KINDS

SLACK_S = 6


@pytest.fixture(scope="module")
def short_pool() -> Iterator[RankPool]:
    """Three ranks that make a group of their own for each test, which it may break."""
    with RankPool(3, timeout_s=30) as ranks:
        yield ranks


def plans_differ(world: dist.ProcessGroup, schedule: str, kind: str) -> tuple[str, str]:
    """What a good batch raises, then one whose documents are others on the last rank."""
    group = fresh_group(world, timeout_s=30)
    size, chunks = group.size(), 2 * group.size()
    layouts = [SequenceLayout.packed([0, n * chunks, 6 * chunks], size, kind) for n in (2, 3)]
    batches = [Microbatch.of(group, layout=layout) for layout in layouts]
    roller = make_roller(schedule, group, NUM_DEPTHS)
    first = error_of(lambda: batches[0].start(roller).at(1))
    mine = batches[group.rank() == group.size() - 1]
    return first, error_of(lambda: mine.start(roller).at(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", PACKED)
def test_plans_that_differ_raise_at_the_receiver(short_pool: RankPool, schedule, kind):
    """Of three ranks with a zigzag, 2 hears from 1, 1 from 0 and 2, and 0 from 1 (and from 2 by depth 2).

    Contiguous ranks hear from those above alone: the last one hears from nobody and cannot know.
    """
    results = short_pool.run(plans_differ, 3, schedule, kind)
    assert [first for first, _ in results] == ["nothing"] * 3
    _, of_middle, of_last = (second for _, second in results)
    heard = [(of_middle, ["rank 2"])]
    if kind != "contiguous":
        heard.append((of_last, ["rank 0", "rank 1"]))
    else:
        assert of_last == "nothing"
    for error, peers in heard:
        assert error.startswith("RuntimeError: "), error
        assert "plan" in error
        assert any(peer in error for peer in peers), error


def stay_away(group: dist.ProcessGroup, schedule: str) -> str:
    """Rank 1, a neighbour of both others, takes part in the first microbatch and not in the second."""
    batch, roller = Microbatch.of(group), make_roller(schedule, group, NUM_DEPTHS, check_layouts=False)
    assert batch.wrong(batch.start(roller)) == []
    return "away" if group.rank() == ODD_RANK else error_of(lambda: batch.start(roller).at(1))


def miss_the_agreement(group: dist.ProcessGroup) -> str:
    batch, roller = Microbatch.of(group), make_roller("prefetch", group, NUM_DEPTHS)
    return "away" if group.rank() == ODD_RANK else error_of(batch.start, roller)


def come_with_another_dtype(group: dist.ProcessGroup) -> str:
    """After the agreement one rank wants another, the others exchange."""
    batch, roller = Microbatch.of(group), make_roller("prefetch", group, NUM_DEPTHS)
    assert batch.wrong(batch.start(roller)) == []
    if group.rank() == ODD_RANK:
        batch.full = replace_labels(batch.full, torch.Tensor.long)
    return error_of(lambda: batch.start(roller).at(1))


def come_with_what_was_agreed_before(group: dist.ProcessGroup) -> str:
    """All agreed on one kind of batch, then on another; then one rank alone goes back to the first.

    Messages of the two kinds differ in length, which would end a gloo process without a word.
    """
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    few, many = (Microbatch.of(group, rows=rows) for rows in (1, 2))
    for batch in (few, many):
        batch.start(roller).at(1)
    mine = few if group.rank() == ODD_RANK else many
    return error_of(lambda: mine.start(roller).at(1))


# What the error says on rank 1 ("" if that rank stays away), and what it says on the others.
SCENARIOS: dict[str, tuple[Callable[..., str], list[str], str, str]] = {
    **{f"away, {name}": (stay_away, [name], "", "exchange") for name in EXCHANGING},
    "away, sync": (stay_away, ["sync"], "", "roll of document"),
    "agreement": (miss_the_agreement, [], "", "agreement before the first exchange of 'prefetch'"),
    "another dtype": (come_with_another_dtype, [], "another plan", "another plan"),
    "going back": (come_with_what_was_agreed_before, [], "another plan", "another plan"),
}


def time_out_together(world: dist.ProcessGroup) -> dict[str, tuple[str, float]]:
    """The error and the seconds of every scenario. Each has a thread and a group, so that they wait side by side."""
    groups = {name: fresh_group(world) for name in SCENARIOS}

    def timed(name: str) -> tuple[str, float]:
        scenario, arguments, *_ = SCENARIOS[name]
        begin = time.monotonic()
        return scenario(groups[name], *arguments), time.monotonic() - begin

    with ThreadPoolExecutor(len(groups)) as threads:
        return dict(zip(groups, threads.map(timed, groups), strict=True))


@pytest.fixture(scope="module")
def timeouts(short_pool: RankPool) -> list[dict[str, tuple[str, float]]]:
    return short_pool.run(time_out_together, 3)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_rank_that_is_absent_or_elsewhere_ends_in_an_error_that_names_the_exchange(timeouts, name):
    _, _, on_odd_rank, on_others = SCENARIOS[name]
    for rank, answers in enumerate(timeouts):
        error, seconds = answers[name]
        words = on_odd_rank if rank == ODD_RANK else on_others
        if not words:
            assert error == "away"
            continue
        assert error.startswith("RuntimeError: "), error
        for word in ("overlap_mtp", f"rank {rank}", words):
            assert word in error, error
        assert seconds < TIMEOUT_S + SLACK_S
