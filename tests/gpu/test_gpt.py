"""The model on GPUs: its gradients under every schedule, flash attention in bfloat16, and recomputed layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from test_model import layout_of, local_shards, loss_and_gradients, make_batch, wrong_gradients
from test_recompute import wrong_when_recomputed

from overlap_mtp.model.config import PRESETS
from overlap_mtp.model.gpt import GPT

from rank_pool import RankPool, device_of

pytestmark = pytest.mark.multi_gpu


def bf16_errors(group: dist.ProcessGroup, documents: str) -> dict[str, float]:
    """Relative errors of flash attention in bfloat16, compared with a mask in fp32 and the same weights."""
    layout = layout_of(documents, group.size(), "zigzag")
    local = local_shards(group, "prefetch", layout, make_batch(layout))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = GPT(PRESETS["tiny"].model, group).bfloat16().to(device_of(group), dtype)
        loss, gradients = loss_and_gradients(model, local, layout)
        found.append((loss.float(), [gradient.float() for gradient in gradients]))
    (loss, expected), (loss_16, gradients) = found
    return {
        "loss": float((loss_16 - loss).abs() / loss.abs()),
        "gradients": max(float((a - b).norm() / a.norm()) for a, b in zip(expected, gradients, strict=True)),
    }


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_gradients_are_right_under_every_schedule_on_gpus(gpu_pool: RankPool, documents):
    size = gpu_pool.world_size
    layout = layout_of(documents, size, "zigzag")
    assert gpu_pool.run(wrong_gradients, size, layout, "uneven", torch.float64) == [{}] * size


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_flash_attention_agrees_with_a_mask_in_fp32_on_gpus(gpu_pool: RankPool, documents):
    for errors in gpu_pool.run(bf16_errors, gpu_pool.world_size, documents):
        assert errors["loss"] < 2e-3, errors
        assert errors["gradients"] < 5e-2, errors


@pytest.mark.parametrize("schedule", ["sync", "prefetch"])
def test_recomputing_on_gpus(gpu_pool: RankPool, schedule):
    size = gpu_pool.world_size
    assert gpu_pool.run(wrong_when_recomputed, size, schedule, "packed") == [[]] * size
