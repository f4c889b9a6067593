"""Rolls of activations when ranks' losses differ, steps fail, or ranks are out of step."""

from __future__ import annotations

import pytest
from activation_losses import (
    look_under_no_grad,
    lose_a_gradient,
    lose_one_of_several_results,
    run_again_after_a_failed_pass,
    run_backward_beside_collectives,
    wrong_after_passes,
)

from activation_faults import (
    close_with_exchanges_under_way,
    gradients_that_change,
    leaks,
    recompute,
    roll_among_others,
    run_backward_of_several_microbatches,
    what_outlives_a_step,
)
from activation_strays import (
    DIFFERENT,
    OUT_OF_STEP,
    assert_tp_ranks_heard,
    compare_by_sync,
    count_collectives_of_none,
    differ_among_tp_ranks,
    go_out_of_step,
    go_out_of_step_far_away,
    start_other_kinds,
    wrong_if_sync_goes_in_another_order,
)
from cases import ODD_RANK
from pretended_gpus import on_pretended_gpus
from rank_pool import TIMEOUT_S, RankPool

SLACK_S = 6


def test_every_rank_takes_part_in_backward_whatever_its_losses_use(ranks: RankPool):
    ranks.check(wrong_after_passes, 3)


def test_gradients_that_a_rank_cannot_deliver_are_an_error_there(ranks: RankPool):
    for rank, errors in enumerate(ranks.run(lose_a_gradient, 3)):
        for error in errors:
            if rank == ODD_RANK:
                assert error.startswith(
                    f"RuntimeError: overlap_mtp: peers sent gradients of b, but the loss of cp rank {rank}"
                )
            else:
                assert error == "nothing"


def test_one_of_several_results_without_a_gradient_is_an_error_there(ranks: RankPool):
    errors = ranks.run(lose_one_of_several_results, 3)
    assert errors.pop(ODD_RANK).startswith(
        "RuntimeError: overlap_mtp: peers sent gradients of b, but the loss"
    )
    assert errors == ["nothing"] * 2


def test_a_pass_after_one_that_failed_adds_nothing_of_it(ranks: RankPool):
    ranks.check(run_again_after_a_failed_pass, 3)


def test_ranks_do_not_wait_for_each_other_in_turn(ranks: RankPool):
    ranks.check(run_backward_beside_collectives, 3)


def test_rolls_that_are_first_taken_under_no_grad_have_gradients(ranks: RankPool):
    ranks.check(look_under_no_grad, 3)


def test_steps_that_end_early_leak_nothing_and_the_next_are_right(ranks: RankPool):
    ranks.check(leaks, 3)


def test_nothing_of_a_step_outlives_it(ranks: RankPool):
    ranks.check(what_outlives_a_step, 3)


def test_rollers_closed_with_exchanges_under_way_leak_nothing(ranks: RankPool):
    ranks.check(close_with_exchanges_under_way, 3)


def test_gradients_stay_as_they_are_while_they_may_be_read(ranks: RankPool):
    ranks.check(gradients_that_change, 3)


def test_recomputed_layers_send_nothing_again_and_give_the_same_bits(ranks: RankPool):
    ranks.check(recompute, 3)


def test_microbatches_of_several_rollers_do_not_disturb_each_other(ranks: RankPool):
    ranks.check(roll_among_others, 3)


def test_one_backward_of_several_microbatches_whose_rolls_a_rank_does_not_use(ranks: RankPool):
    ranks.check(run_backward_of_several_microbatches, 3)


@pytest.fixture(scope="module")
def other_kinds(ranks: RankPool) -> list[dict[str, tuple[str, list[str]]]]:
    return ranks.run(start_other_kinds, 3)


@pytest.mark.parametrize("case", DIFFERENT)
def test_all_ranks_refuse_what_one_rank_starts_first(other_kinds, case):
    for found in other_kinds:
        error, wrong = found[case]
        assert error.startswith("ValueError: "), error
        for word in (f"cp rank {ODD_RANK}", *DIFFERENT[case][2]):
            assert word in error, error
        assert wrong == []


@pytest.fixture(scope="module")
def out_of_step() -> list[dict[tuple[str, str], list[tuple[str, float]]]]:
    with RankPool(3, timeout_s=30, sizes=()) as three:
        return three.run(go_out_of_step, 3)


@pytest.mark.parametrize(("schedule", "case"), OUT_OF_STEP)
def test_a_rank_out_of_step_is_an_error_on_all_ranks(out_of_step, schedule, case):
    """Those that hear from it say so at once. Those that wait for it name it within the group's timeout."""
    is_heard = schedule != "sync" and case not in ("away", "no backward")
    for rank, outcomes in enumerate(out_of_step):
        (first, _), (second, seconds), (third, _) = outcomes[schedule, case]
        assert first == "right", first
        assert third.startswith("RuntimeError: "), third
        assert seconds < (TIMEOUT_S / 2 if is_heard else TIMEOUT_S + SLACK_S), (second, seconds)
        if rank == ODD_RANK and case in ("away", "no backward"):
            continue
        if rank == ODD_RANK and case == "illegal":
            assert second.startswith("ValueError: a must be one of float64"), second
            continue
        assert second.startswith("RuntimeError: overlap_mtp: "), second
        assert f"cp rank {ODD_RANK}" in second, second
        if is_heard:
            assert "exchanged activations by another plan" in second, second
            assert "cu_seqlens, valid_lengths, of_batch" in second, second
        elif rank != ODD_RANK:
            assert f"waited for cp rank {ODD_RANK}" in second, second


def test_sync_compares_layouts_if_it_is_asked_to(ranks: RankPool):
    for rank, found in enumerate(ranks.run(compare_by_sync, 4)):
        for case, ((first, _), (second, seconds), (third, _)) in found.items():
            assert first == "right", first
            assert seconds < TIMEOUT_S / 2, (case, seconds)
            if case == "illegal" and rank == ODD_RANK:
                assert second.startswith("ValueError: a must be one of float64"), second
            else:
                assert "started another microbatch than cp rank" in second, (case, second)
            assert third == "right", (case, third)


@pytest.mark.parametrize("is_symmetric", [None, False])
def test_sync_compares_the_order_of_joins_and_of_backward_if_it_is_asked_to(ranks: RankPool, is_symmetric):
    """Between GPUs its messages would hold rows of the other microbatch, and nobody would notice."""
    ranks.check(on_pretended_gpus, 4, is_symmetric, wrong_if_sync_goes_in_another_order)


def test_tp_ranks_that_differ_are_an_error_on_all_ranks(ranks: RankPool):
    assert_tp_ranks_heard(ranks.run(differ_among_tp_ranks, 4))


def test_none_sums_nothing_over_tp_ranks(ranks: RankPool):
    for *counts, of_none in ranks.run(count_collectives_of_none, 4):
        assert all(counts)
        assert of_none == 0


def test_ranks_that_are_no_neighbours_of_one_out_of_step_hear_of_it(ranks: RankPool):
    """Rank 3 of 4 has nothing to do with rank 1. It hears from rank 2, which heard from rank 1."""
    by_rank = ranks.run(go_out_of_step_far_away, 4)
    for rank, found in enumerate(by_rank):
        for case, ((first, _), (second, seconds), _) in found.items():
            assert first == "right", (case, first)
            assert seconds < TIMEOUT_S, (case, rank, second, seconds)
            error = (
                "ValueError: " if rank == ODD_RANK and case[1] == "illegal" else "RuntimeError: overlap_mtp: "
            )
            assert second.startswith(error), (case, rank, second)
