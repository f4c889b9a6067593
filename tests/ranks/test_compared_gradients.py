"""A comparison finds gradients that a schedule gets wrong, on CPU ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from compare.comparison import Comparison, Problem, Settings
from compare.sentence import wrong_bits
from overlap_mtp.model.config import PRESETS
from overlap_mtp.schedules.activations import Backward

from rank_pool import RankPool


def wrong_in_comparison(group: dist.ProcessGroup, factor: float) -> dict[str, str] | None:
    """What is wrong in the record of a comparison in which `overlap` scales its gradients."""
    end = Backward.end

    def scaled(self: Backward) -> list[torch.Tensor]:
        sums = end(self)
        return [factor * one for one in sums] if self._transport.is_overlapped else sums

    model = replace(PRESETS["tiny"].model, hidden_state_mixing=True)
    problem = Problem(model, 64 * group.size(), 1, 4, forward_only=False)
    settings = Settings(modes=("overlap", "merged"), rounds=2, warmup=1)
    Backward.end = scaled
    try:
        result = Comparison(problem, settings, torch.device("cpu")).run(Console(quiet=True))
    finally:
        Backward.end = end
    return None if result is None else wrong_bits(result)


@pytest.mark.parametrize(("factor", "wrong"), [(1, {}), (7, {"overlap": "gradients"})])
def test_gradients_are_compared(ranks: RankPool, factor, wrong):
    assert ranks.run(wrong_in_comparison, 4, factor)[0] == wrong
