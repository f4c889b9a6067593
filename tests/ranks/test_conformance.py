"""The conformance kit finds every mutant of a correct roll, and says where it is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.conformance import Case, Outcome, cases_for, check_target
from overlap_mtp.conformance.cases import draw
from overlap_mtp.conformance.targets import FunctionTarget, load_target

from mutants import MUTANTS, plain_roll
from rank_pool import RankPool


def outcomes_of(
    group: dist.ProcessGroup, mutant: str | None, cases: list[Case] | None = None
) -> list[Outcome]:
    """What the kit says of a mutant up to the first case that is not right, or of the correct roll."""
    target = FunctionTarget(mutant or "plain", MUTANTS[mutant]() if mutant else plain_roll())
    return check_target(target, cases or cases_for(group.size()), group, stop_at_first=mutant is not None)


def outcomes_of_schedule(group: dist.ProcessGroup, schedule: str) -> list[Outcome]:
    return check_target(load_target("overlap_mtp", schedule), cases_for(group.size(), quick=True), group)


def outcomes_of_narrow_sums(group: dist.ProcessGroup) -> list[Outcome]:
    """Of a correct roll whose sums have the dtype of the tensor, and may overflow."""
    roll = plain_roll(total=lambda _, rolled: rolled.sum(dtype=rolled.dtype))
    return check_target(FunctionTarget("narrow", roll), cases_for(group.size(), quick=True), group)


def test_a_sum_may_have_the_dtype_of_the_tensor(ranks: RankPool):
    assert [one for one in ranks.run(outcomes_of_narrow_sums, 2)[0] if not one.is_right] == []


@pytest.mark.parametrize("cp_size", [2, 3])
def test_the_correct_roll_is_right(ranks: RankPool, cp_size):
    everyone = ranks.run(outcomes_of, cp_size, None)
    assert [one for one in everyone[0] if not one.is_right] == []
    assert [one.case for one in everyone[-1]] == [case.name for case in cases_for(cp_size)]


@pytest.mark.parametrize("schedule", ["sync", "prefetch"])
def test_schedules_are_right(ranks: RankPool, schedule):
    outcomes = ranks.run(outcomes_of_schedule, 4, schedule)[0]
    assert [one for one in outcomes if not one.is_right] == []


@pytest.mark.parametrize(("cp_size", "quick"), [(2, True), (3, False)])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(ranks: RankPool, mutant, cp_size, quick):
    everyone = ranks.run(outcomes_of, cp_size, mutant, cases_for(cp_size, quick))
    assert everyone[0][-1].result == ("refused" if "refuses" in mutant else "wrong")
    details = [[one.detail for one in outcomes] for outcomes in everyone]
    assert details == details[:1] * cp_size  # the ranks agree


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 40


def test_a_report_says_where_the_roll_is_wrong(ranks: RankPool):
    """Zigzag over two ranks: rank 1 holds the positions 2 to 5."""
    case = Case("one", (SequenceLayout.dense(8, 2),), num_depths=2)
    outcome = ranks.run(outcomes_of, 2, "wrong on the last rank", [case])[0][0]
    where = (outcome.batch, outcome.depth, outcome.cp_rank, outcome.row, outcome.position)
    assert where == (0, 1, 1, 0, 2)
    assert (outcome.expected, outcome.actual) == (4, 1)
    assert (outcome.positions, outcome.num_wrong) == ((2,), 2)
    assert outcome.detail == (
        "depth 1: 2 of 16 tokens, at 2; first on rank 1, row 0, position 2: expected 4, got 1"
    )


def test_a_report_counts_over_all_ranks(ranks: RankPool):
    """Documents of 4 and 8 tokens over two ranks, without their ends: position 3 takes the token after it."""
    case = Case("two", (SequenceLayout.packed([0, 4, 12, 16], 2),), num_depths=4, rows=None, bounds="same")
    outcome = ranks.run(outcomes_of, 2, "no document ends", [case])[1][0]
    assert (outcome.depth, outcome.cp_rank, outcome.position) == (1, 0, 3)
    assert (outcome.expected, outcome.actual, outcome.positions) == (0, 5, (3, 11))


@pytest.mark.parametrize(
    ("mutant", "text"),
    [
        ("int32 returned as int64", "depth 1, rank 0: the dtype must be int32, got int64"),
        ("another shape for 1-D tensors", "depth 1, rank 0: the shape must be [18], got [1, 18]"),
        ("writes into its input", "the roll changed its input, the tensor at depth 0"),
        ("stale: one buffer for all results", "depth 1: 38 of 40 tokens, at 0 1 2 3 4 5 ..."),
        ("stale: two buffers for all results", "it was right when it was returned"),
        ("the sum of its input", "depth 1, rank 0: the sum must be"),
        ("refuses bool", "on all ranks: NotImplementedError: no torch.bool"),
    ],
)
def test_a_report_names_other_faults(ranks: RankPool, mutant, text):
    assert text in ranks.run(outcomes_of, 2, mutant)[0][-1].detail


@pytest.mark.parametrize("cp_size", range(1, 9))
@pytest.mark.parametrize("quick", [False, True])
def test_names_are_unique_on_any_number_of_ranks(cp_size, quick):
    names = [case.name for case in cases_for(cp_size, quick)]
    assert len({*names}) == len(names)
    assert 40 <= len(names) <= 140


def test_draws_tell_positions_apart():
    for number in (0, 1):
        assert draw((2, 500), torch.int64, number).unique().numel() == 1000
    assert (draw((1, 500), torch.bfloat16, 2)[0, 1:] != draw((1, 500), torch.bfloat16, 2)[0, :-1]).all()
    assert not draw((2, 500), torch.float16, 1).isnan().any()
