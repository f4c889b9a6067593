"""Rolls of activations on GPUs: the bodies of tests/ranks over NCCL."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_faults
import activations
from exact_activations import SEQ_DIM
from rank_bodies import LAYOUTS
from rank_pool import RankPool
from strategies import KINDS, layouts

pytestmark = pytest.mark.multi_gpu
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("form", SEQ_DIM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
def test_every_row_and_its_gradient_are_those_of_the_definition_on_gpus(
    gpu_pool: RankPool, documents, kind, form
):
    size = gpu_pool.world_size
    for length, num_depths, dtype in ((16, 5, torch.float64), (256, 2, torch.bfloat16)):
        layout = LAYOUTS[documents](length * size, size, kind)
        gpu_pool.check(activations.rows_differ, size, layout, num_depths, form, "ab", dtype, 7, False)


@settings(max_examples=5)
@given(data=st.data(), num_depths=st.integers(1, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999))
def test_rows_are_exact_on_any_layout_on_gpus(gpu_pool: RankPool, data, num_depths, dtype, seed):
    layout = data.draw(layouts(cp_sizes=(gpu_pool.world_size,)))
    how = layout, num_depths, "BLH", "ab", dtype, seed, False
    gpu_pool.check(activations.rows_differ, layout.cp_size, *how)


@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedules_and_runs_give_the_same_bits_on_gpus(gpu_pool: RankPool, documents, dtype):
    size = gpu_pool.world_size
    layout = LAYOUTS[documents](64 * size, size, "zigzag")
    gpu_pool.check(activations.bits_differ, size, layout, dtype)


@pytest.mark.parametrize(
    "body",
    [activation_faults.wrong_after_passes, activation_faults.recompute, activation_faults.roll_among_others],
)
def test_autograd_is_right_on_gpus(gpu_pool: RankPool, body):
    gpu_pool.check(body, gpu_pool.world_size)


def test_rows_that_tp_ranks_share_are_those_of_the_definition_on_gpus(gpu_pool: RankPool):
    size = gpu_pool.world_size
    gpu_pool.check(activations.shared_rows_differ, size, [(2, size // 2), (size, 1)])
