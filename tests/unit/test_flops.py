"""The count of model FLOPs, against torch's counter on a model that computes just what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import PRESETS
from overlap_mtp.model.gpt import GPT
from overlap_mtp.training.flops import attention_pairs, step_flops

TOKENS = 32


def counted(config) -> int:
    """Forward and backward of one dense sequence. Attention by plain products computes the masked pairs, too."""
    model, layout = GPT(config), SequenceLayout.dense(TOKENS, 1, "zigzag")
    ids = torch.arange(TOKENS)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch, layout).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_depths": 3, "num_kv_heads": 1, "vocab_size": 48, "repeat_mtp_layer": True},
        {"num_experts": 3, "experts_per_token": 2},
        {"mtp_inputs": "embeddings", "hidden_state_mixing": True, "distillation": "tv"},
        {"distillation": "kl", "distillation_detach": False},
    ],
)
def test_torch_counts_the_same(changes):
    config = replace(PRESETS["tiny"].model, **changes)
    assert counted(config) == step_flops(config, TOKENS, TOKENS * TOKENS)


def test_only_pairs_of_a_document_count_and_no_padding():
    layout = SequenceLayout.packed([0, 8, 24, 32], 2, "zigzag", valid_lengths=[5, 16, 7], seq_len=36)
    assert attention_pairs(layout) == 15 + 136 + 28
    assert attention_pairs(SequenceLayout.dense(32, 2, "zigzag")) == 32 * 33 // 2
