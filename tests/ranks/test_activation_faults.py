"""Rolls of activations when ranks' losses differ, steps fail, or ranks are out of step."""

from __future__ import annotations

from activation_faults import wrong_after_passes
from rank_pool import RankPool


def test_every_rank_takes_part_in_backward_whatever_its_losses_use(ranks: RankPool):
    wrong = ranks.run(wrong_after_passes, 3, limit_s=20)
    assert wrong == [[]] * 3, wrong
