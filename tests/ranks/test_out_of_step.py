"""Ranks that are out of step: an error on all of them, and never a token of another microbatch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import Roller, SequenceLayout, make_roller

from cases import NUM_DEPTHS, ODD_RANK, PACKED, Microbatch, error_of, replace_labels
from rank_pool import RankPool

Outcome = str | list[str]  # an error, or what is wrong with the rolls


def on_fresh_group(
    world: dist.ProcessGroup, body: Callable[..., object], cp_size: int, *arguments: object
) -> object:
    """Run a body on a cp group of its own, which is of no further use afterwards."""
    group = dist.new_group(list(range(cp_size)))
    return body(group, *arguments) if dist.get_rank(group) >= 0 else None


def run(ranks: RankPool, body: Callable[..., object], cp_size: int, *arguments: object) -> list:
    return ranks.run(on_fresh_group, 4, body, cp_size, *arguments)[:cp_size]


def outcome(batch: Microbatch, roller: Roller, *, is_bad: bool = False) -> Outcome:
    shards = batch.shards()
    if is_bad:
        shards = replace_labels(shards, lambda labels: labels[..., 1:])
    try:
        return batch.wrong(roller.start(shards, batch.layout))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def skip_a_bad_batch(
    group: dist.ProcessGroup, schedule: str, bad_ranks: tuple[int, ...], is_mixed: bool = False
) -> list[Outcome]:
    """Outcomes of seven microbatches. The third is bad on some ranks, and every rank goes on after an error.

    `is_mixed`: its tensors have several shapes.
    """
    roller = make_roller(schedule, group, NUM_DEPTHS, check_layouts=True)
    batches = [Microbatch.of(group, variant=step, shift=1000 * step) for step in range(7)]
    for batch in batches if is_mixed else ():
        ids = batch.full["input_ids"]
        batch.full |= {"padding_mask": ids[0] % 3 == 0, "position_ids": torch.stack([ids, ids + 1, ids + 2])}
    return [
        outcome(batch, roller, is_bad=step == 2 and group.rank() in bad_ranks)
        for step, batch in enumerate(batches)
    ]


@pytest.mark.parametrize("bad_rank", [0, ODD_RANK])
@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("schedule", PACKED)
def test_a_bad_batch_on_one_rank_stops_all_ranks(ranks: RankPool, schedule, cp_size, bad_rank):
    """The neighbours hear of it at once, the others from them one exchange later."""
    for rank, outcomes in enumerate(run(ranks, skip_a_bad_batch, cp_size, schedule, (bad_rank,))):
        assert outcomes[:2] == [[], []]
        first, last = (
            ("ValueError", 3) if rank == bad_rank else ("RuntimeError", 2 + abs(rank - bad_rank) - 1)
        )
        failed = next(step for step, one in enumerate(outcomes) if one)
        assert failed <= last
        assert outcomes[failed].startswith(first), outcomes
        assert all(one.startswith("RuntimeError") for one in outcomes[failed + 1 :]), outcomes
        assert "another plan" in outcomes[-1]


@pytest.mark.parametrize("bad_rank", [0, ODD_RANK])
def test_sync_finds_a_bad_batch_at_once_and_can_go_on(ranks: RankPool, bad_rank):
    for rank, outcomes in enumerate(run(ranks, skip_a_bad_batch, 4, "sync", (bad_rank,))):
        error = outcomes.pop(2)
        assert error.startswith(
            "ValueError" if rank == bad_rank else f"RuntimeError: overlap_mtp: cp rank {bad_rank}"
        )
        assert outcomes == [[]] * 6


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("schedule", ["sync", *PACKED])
def test_a_bad_batch_on_all_ranks_leaves_them_in_step(ranks: RankPool, schedule, is_mixed):
    for outcomes in run(ranks, skip_a_bad_batch, 3, schedule, (0, 1, 2), is_mixed):
        assert outcomes.pop(2).startswith("ValueError")
        assert outcomes == [[]] * 6


def start_in_another_order(group: dist.ProcessGroup, schedule: str) -> list[Outcome]:
    """Two rollers of one kind; on one rank the second is started first."""
    rollers = [make_roller(schedule, group, NUM_DEPTHS) for _ in range(2)]
    outcomes = [outcome(Microbatch.of(group, shift=i), roller) for i, roller in enumerate(rollers)]
    order = (1, 0) if group.rank() == ODD_RANK else (0, 1)
    return outcomes + [outcome(Microbatch.of(group, shift=10 + i), rollers[i]) for i in order]


def make_in_another_order(group: dist.ProcessGroup, schedule: str) -> list[Outcome]:
    """Two rollers that differ in nothing but the order in which one rank made them."""
    rollers = [make_roller(schedule, group, NUM_DEPTHS) for _ in range(2)]
    if group.rank() == ODD_RANK:
        rollers.reverse()
    return [[], [], *(outcome(Microbatch.of(group, shift=i), roller) for i, roller in enumerate(rollers))]


@pytest.mark.parametrize("body", [start_in_another_order, make_in_another_order])
@pytest.mark.parametrize("schedule", ["sync", *PACKED])
def test_rollers_in_another_order_are_found_out(ranks: RankPool, body, schedule):
    for outcomes in run(ranks, body, 3, schedule):
        assert outcomes[:2] == [[], []]
        assert all("Error: " in one for one in outcomes[2:]), outcomes
        if body is make_in_another_order:  # before any message of tokens
            assert "number of the roller: cp rank 0 has" in outcomes[2]


def ask_in_another_order(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Two microbatches: one rank takes the second before the first."""
    roller = make_roller(schedule, group, NUM_DEPTHS, check_layouts=True)
    batches = [Microbatch.of(group, shift=1000 * step) for step in range(2)]
    first, second = (batch.start(roller) for batch in batches)
    asked = [(first, 1), (second, 1), (first, 2), (second, 2)]
    if group.rank() == ODD_RANK:
        asked = [(second, 1), (first, 1), (second, 2), (first, 2)]
    return [error_of(rolls.at, depth) for rolls, depth in asked]


@pytest.mark.parametrize("schedule", ["merged", "overlap", "sync"])
def test_depths_in_another_order_are_found_out(ranks: RankPool, schedule):
    """`sync` compares, and would otherwise give one microbatch the tokens of the other on GPUs."""
    for errors in run(ranks, ask_in_another_order, 3, schedule):
        assert any(error.startswith("RuntimeError: ") for error in errors), errors


def refuse_unchecked(group: dist.ProcessGroup) -> list[Outcome]:
    """On one rank the second of three microbatches is bad; the others do not start it."""
    roller = make_roller("sync", group, NUM_DEPTHS, check_layouts=False)
    outcomes = [outcome(Microbatch.of(group), roller)]
    if group.rank() == ODD_RANK:
        outcomes += [outcome(Microbatch.of(group, shift=i), roller, is_bad=i == 1) for i in (1, 2)]
    return outcomes


def test_unchecked_sync_exchanges_nothing_after_a_bad_batch(ranks: RankPool):
    """Its peers may be in the middle of that microbatch: a later one would give them its tokens."""
    outcomes = run(ranks, refuse_unchecked, 2)[ODD_RANK]
    assert outcomes[0] == []
    assert outcomes[1].startswith("ValueError")
    assert outcomes[2].startswith("RuntimeError")
    assert "check_layouts=True" in outcomes[2]


def start_another_kind(group: dist.ProcessGroup, what: str) -> list[Outcome]:
    """Outcomes of four microbatches of `sync`; in the second one rank has other documents or another dtype."""
    roller, chunks = make_roller("sync", group, NUM_DEPTHS, check_layouts=True), 2 * group.size()
    usual, odd = (SequenceLayout.packed([0, n * chunks, 6 * chunks], group.size()) for n in (2, 3))
    good, other = (Microbatch.of(group, layout=one) for one in (usual, odd if what == "layout" else usual))
    if what == "dtype":
        other.full = replace_labels(other.full, torch.Tensor.long)
    second = other if group.rank() == ODD_RANK else good
    return [outcome(one, roller) for one in (good, second, good, other)]


@pytest.mark.parametrize("what", ["layout", "dtype"])
def test_sync_finds_another_kind_of_batch_and_can_go_on(ranks: RankPool, what):
    for first, second, *later in run(ranks, start_another_kind, 3, what):
        assert first == []
        assert later == [[], []]
        assert second.startswith("RuntimeError: overlap_mtp: cp rank "), second
        assert "started another microbatch" in second


def ask_again(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """The errors of three `at` of a microbatch for which one rank has another layout."""
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batches = [Microbatch.of(group, variant=group.rank() == ODD_RANK and step) for step in range(2)]
    assert outcome(batches[0], roller) == []
    rolls = batches[1].start(roller)
    return [error_of(rolls.at, depth) for depth in (1, 1, 2)]


@pytest.mark.parametrize("schedule", PACKED)
def test_wrong_rolls_are_never_returned(ranks: RankPool, schedule):
    """Not to a caller who asks again, either."""
    for errors in run(ranks, ask_again, 2, schedule):
        assert all("another plan" in error for error in errors), errors


def go_on_after_a_failure(group: dist.ProcessGroup, schedule: str) -> list[tuple[str, float]]:
    """Errors of both depths of a microbatch, and how long they took. Rank 0 has another layout."""
    roller = make_roller(schedule, group, NUM_DEPTHS)
    batches = [Microbatch.of(group, variant=group.rank() == 0 and step) for step in range(2)]
    assert outcome(batches[0], roller) == []
    rolls, errors = batches[1].start(roller), []
    for depth in (1, 2):
        begin = time.monotonic()
        errors.append((error_of(rolls.at, depth), time.monotonic() - begin))
    return errors


@pytest.mark.parametrize("schedule", ["merged", "overlap"])
def test_a_rank_that_goes_on_after_a_failure_keeps_nobody_waiting(ranks: RankPool, schedule):
    """It still starts the exchange of the next depth, which says that it is out of step."""
    results = run(ranks, go_on_after_a_failure, 4, schedule)
    assert all(seconds < 5 for errors in results for _, seconds in errors), results
    assert "another plan" in results[2][1][0]


def name_batches(group: dist.ProcessGroup, schedule: str, names: list[str]) -> list[Outcome]:
    """Outcomes of batches of one layout: one rank gives them these names, the others "sample 0", "sample 1", ..."""
    roller = make_roller(schedule, group, NUM_DEPTHS)
    outcomes = []
    for step, name in enumerate(names):
        one = Microbatch.of(group, shift=step)
        layout = one.layout.of_batch(name if group.rank() == ODD_RANK else f"sample {step}")
        outcomes.append(outcome(replace(one, layout=layout), roller))
    return outcomes


@pytest.mark.parametrize("schedule", ["sync", *PACKED])
def test_ranks_with_other_samples_are_found_out(ranks: RankPool, schedule):
    names = ["sample 0", "sample 1", "sample 3"]
    for outcomes in run(ranks, name_batches, 3, schedule, names):
        assert outcomes[:2] == [[], []]
        assert outcomes[2].startswith("RuntimeError: "), outcomes
        assert "of_batch" in outcomes[2]
