"""Parallel dimensions that cannot be, and the cases that parity and golden values are measured on."""

from __future__ import annotations

from dataclasses import replace

import parity
import pytest
import torch

from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.loss import token_mask
from overlap_mtp.training.parallel import ParallelDims

CONFIG = ModelConfig(
    hidden_size=32, num_layers=1, num_depths=2, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=64
)


@pytest.mark.parametrize(
    ("dims", "change", "seq_len", "world", "words"),
    [
        ((2, 2, 2), {}, 64, 4, r"dp \* cp \* tp must be the number of ranks: 2 \* 2 \* 2 = 8, got 4"),
        ((1, 3, 1), {}, 64, 3, r"seq_len must be a multiple of 2 \* cp = 6, got 64"),
        ((1, 2, 4), {"num_kv_heads": 4}, 20, 8, r"seq_len / cp must be a multiple of tp = 4, got 10"),
        ((1, 1, 4), {}, 64, 4, "num_kv_heads must be a multiple of tp = 4, got 2"),
        ((1, 1, 2), {"ffn_size": 33}, 64, 2, "ffn_size must be a multiple of tp = 2, got 33"),
        ((1, 1, 2), {"vocab_size": 65}, 64, 2, "vocab_size must be a multiple of tp = 2, got 65"),
        ((1, 0, 1), {}, 64, 1, "cp must be >= 1, got 0"),
    ],
)
def test_dimensions_that_disagree_are_named(dims, change, seq_len, world, words):
    with pytest.raises(ValueError, match=words):
        ParallelDims(*dims).check(replace(CONFIG, **change), seq_len, "zigzag", world)


@pytest.mark.parametrize("dims", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)])
def test_context_parallelism_with_mtp_is_legal(dims):
    dims = ParallelDims(*dims)
    dims.check(CONFIG, 64, "zigzag", dims.world)


def test_the_matrix_is_that_of_the_merge_request():
    cases = parity.matrix("float64")
    plain = [one for one in cases if (one.dp, one.num_experts) == (1, 0) and one.activations == "none"]
    assert len(plain) == 8 * 2 * 2
    assert {(case.tp, case.cp) for case in plain} == set(parity.TP_CP)
    for use in list(parity.ACTIVATIONS)[1:]:
        theirs = {(one.tp, one.cp, one.documents, one.recompute) for one in cases if one.activations == use}
        assert theirs == {(one.tp, one.cp, one.documents, one.recompute) for one in plain}
    assert all(case.ranks <= 8 for case in cases)


@pytest.mark.parametrize(("gradient", "passed"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_a_gradient_that_is_off_or_nan_fails(gradient, passed):
    """Wherever it is among those that are right."""
    expected = {"loss": 1.0, "gradients": {name: torch.ones(3) for name in "abc"}}
    for name in "abc":
        found = {"loss": 1.0, "gradients": expected["gradients"] | {name: torch.tensor([1.0, gradient, 1.0])}}
        row = parity.errors(found, expected, 1e-5)
        assert row["passed"] == passed
        assert passed or row["worst"] == name


@pytest.mark.parametrize("documents", ["dense", "packed"])
@pytest.mark.parametrize("cp", [2, 4])
def test_the_number_of_valid_tokens_differs_by_rank_and_row(documents, cp):
    layout, mask = parity.layout_of(documents, cp), parity.batch_of(documents, 4, 64)["loss_mask"]
    shards = [layout.shard(mask, rank) for rank in range(cp)]
    counts = torch.stack(
        [token_mask(shard, layout, rank, 0, like=shard).sum(-1) for rank, shard in enumerate(shards)]
    )
    assert all(len(set(row)) > 1 for row in counts.T.tolist()), counts
    assert len(set(counts.sum(0).tolist())) == 4, counts
