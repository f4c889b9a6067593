"""Rolls of tokens by the transports of GPUs: buffers, kernels and messages, on CPU ranks."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from unittest import mock

import pytest
import torch

from overlap_mtp import SequenceLayout, make_roller
from overlap_mtp.exchange.cuda import free_orphans

import rank_bodies
from pretended_gpus import on_pretended_gpus, pretended_gpus
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


@pytest.mark.parametrize("is_closed", [False, True])
def test_buffers_in_a_graph_outlive_a_roller_that_nobody_closes(is_closed):
    layout = SequenceLayout.dense(24, 1)
    batch = {"input_ids": torch.arange(24)[None]}
    with pretended_gpus():
        roller = make_roller("prefetch", None, 2)
        roller.start(batch, layout).at(1)
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            rolls = roller.start(batch, layout)
            rolls.at(1)
        buffers = weakref.ref(rolls._exchanges[0].buffers)
        if is_closed:
            roller.close()
        del roller, rolls
        gc.collect()
        free_orphans()
    assert (buffers() is None) is is_closed


def test_a_rank_that_stays_away_is_named_each_time(ranks: RankPool):
    said, nothing = ranks.run(on_pretended_gpus, 2, True, rank_bodies.said_of_a_rank_that_stays_away)
    assert nothing == []
    assert "cp rank 0 of 2 gave up waiting for the tokens of cp rank 1" in said[0]
    assert said[1:] == said[:1] * 2
