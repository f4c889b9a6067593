"""Batches that no roller of activations takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from overlap_mtp import SequenceLayout, make_activation_roller
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES

LAYOUT = SequenceLayout.dense(8, 1)
LEGAL = torch.arange(32.0).view(1, 8, 4)
ILLEGAL = {
    "integers": (
        {"a": LEGAL.long()},
        LAYOUT,
        "a must be one of float64, float32, bfloat16, float16, got int64",
    ),
    "two dtypes": ({"a": LEGAL, "b": LEGAL.double()}, LAYOUT, "must have one dtype, got float32 and float64"),
    "too long": ({"a": LEGAL.repeat(1, 2, 1)}, LAYOUT, "must be the layout's local length 8"),
    "one tensor too long": ({"a": LEGAL, "b": LEGAL.repeat(1, 2, 1)}, LAYOUT, "of b must be the layout's"),
    "the sequence first": ({"a": LEGAL[0]}, LAYOUT, "make the roller with seq_dim=0"),
    "no hidden dimension": ({"a": LEGAL[..., 0]}, LAYOUT, "its last dimension the hidden one"),
    "a fourth dimension": ({"a": LEGAL[..., None]}, LAYOUT, "its last dimension the hidden one"),
    "empty rows": ({"a": LEGAL[..., :0]}, LAYOUT, "a must not be empty"),
    "another device": ({"a": LEGAL, "b": LEGAL.to("meta")}, LAYOUT, "all tensors must be on one cpu device"),
    "sparse": ({"a": LEGAL.to_sparse()}, LAYOUT, "a must be a dense tensor, got one of layout torch.sparse"),
    "a list": ({"a": LEGAL.tolist()}, LAYOUT, "a must be a dense tensor, got list"),
    "another name": ({7: LEGAL}, LAYOUT, "the names of tensors must be strings, got 7"),
    "no tensor": ({}, LAYOUT, "hold at least one tensor, got none"),
    "no batch": (LEGAL, LAYOUT, "the batch must be a dict"),
    "another cp size": ({"a": LEGAL}, SequenceLayout.dense(16, 2), "the layout is for cp_size 2"),
    "another length": ({"a": LEGAL}, SequenceLayout.dense(16, 1), "must be the layout's local length 16"),
    "many documents": ({"a": LEGAL}, SequenceLayout.packed([0, 2, 4, 8], 1), "more than max_documents 2"),
    "no layout": ({"a": LEGAL}, None, "the layout must be a SequenceLayout or a DeviceLayout"),
}


@pytest.mark.parametrize("schedule", ACTIVATION_SCHEDULES)
@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_activations_are_refused(schedule, case):
    """At first use and later, and neither harms the next batch."""
    batch, layout, words = ILLEGAL[case]
    roller = make_activation_roller(schedule, None, 1, max_documents=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            roller.start(batch, layout)
        rolled = roller.start({"a": LEGAL}, LAYOUT).at(1)["a"]
        assert torch.equal(rolled, pad(LEGAL[:, 1:], (0, 0, 0, 1)))


def test_documents_are_counted_in_batches_that_are_otherwise_like_the_last_one():
    roller = make_activation_roller("overlap", None, 1, max_documents=2)
    roller.start({"a": LEGAL}, SequenceLayout.packed([0, 4, 8], 1)).at(1)
    with pytest.raises(ValueError, match="more than max_documents 2"):
        roller.start({"a": LEGAL}, SequenceLayout.packed([0, 2, 4, 8], 1))
