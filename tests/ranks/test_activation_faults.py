"""Rolls of activations when ranks' losses differ, steps fail, or ranks are out of step."""

from __future__ import annotations

from activation_faults import (
    close_with_exchanges_under_way,
    leaks,
    look_under_no_grad,
    lose_a_gradient,
    recompute,
    roll_among_others,
    run_backward_of_several_microbatches,
    what_outlives_a_step,
    wrong_after_passes,
)
from cases import ODD_RANK
from rank_pool import RankPool


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


def test_rolls_that_are_first_taken_under_no_grad_have_gradients(ranks: RankPool):
    ranks.check(look_under_no_grad, 3)


def test_steps_that_end_early_leak_nothing_and_the_next_are_right(ranks: RankPool):
    ranks.check(leaks, 3)


def test_nothing_of_a_step_outlives_it(ranks: RankPool):
    ranks.check(what_outlives_a_step, 3)


def test_rollers_closed_with_exchanges_under_way_leak_nothing(ranks: RankPool):
    ranks.check(close_with_exchanges_under_way, 3)


def test_recomputed_layers_send_nothing_again_and_give_the_same_bits(ranks: RankPool):
    ranks.check(recompute, 3)


def test_microbatches_of_several_rollers_do_not_disturb_each_other(ranks: RankPool):
    ranks.check(roll_among_others, 3)


def test_one_backward_of_several_microbatches_whose_rolls_a_rank_does_not_use(ranks: RankPool):
    ranks.check(run_backward_of_several_microbatches, 3)
