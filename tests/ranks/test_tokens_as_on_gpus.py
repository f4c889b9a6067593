"""Rolls of tokens by the transports of GPUs: buffers, kernels and messages, on CPU ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import rank_bodies
from pretended_gpus import on_pretended_gpus
from rank_bodies import LAYOUTS
from rank_pool import RankPool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them on GPUs")
OVER = [pytest.param(False, id="process_group"), pytest.param(True, id="symmetric")]
DTYPES = {"input_ids": torch.int64, "labels": torch.int32, "loss_mask": torch.float16}


@pytest.mark.parametrize("is_symmetric", OVER)
@pytest.mark.parametrize(
    ("documents", "kind"), [("dense", "contiguous"), ("packed", "zigzag"), ("padded", "zigzag_stream")]
)
def test_rolls_are_exact(ranks: RankPool, documents, kind, is_symmetric):
    layout = LAYOUTS[documents](64, 4, kind)
    ranks.check(on_pretended_gpus, 4, is_symmetric, rank_bodies.rolls_differ, layout, 2, 1, DTYPES)


@pytest.mark.parametrize("is_symmetric", OVER)
def test_tensors_of_other_shapes_depths_and_fills_travel_together(ranks: RankPool, is_symmetric):
    layout = LAYOUTS["padded"](48, 3, "zigzag")
    ranks.check(on_pretended_gpus, 3, is_symmetric, rank_bodies.mixed_rolls_differ, layout)


@pytest.mark.parametrize(
    ("body", "is_symmetric"),
    [
        (rank_bodies.wait_late, False),
        (rank_bodies.wait_late, True),
        (rank_bodies.drop_rolls, True),
        (rank_bodies.close_under_way, False),
        (partial(rank_bodies.interleave, second="overlap"), True),
    ],
)
def test_exchanges_under_way_do_not_disturb_each_other(ranks: RankPool, body, is_symmetric):
    ranks.check(on_pretended_gpus, 2, is_symmetric, body, "prefetch")


def test_a_rank_that_stays_away_is_named_each_time(ranks: RankPool):
    said, nothing = ranks.run(on_pretended_gpus, 2, True, rank_bodies.said_of_a_rank_that_stays_away)
    assert nothing == []
    assert "cp rank 0 of 2 gave up waiting for the tokens of cp rank 1" in said[0]
    assert said[1:] == said[:1] * 2
