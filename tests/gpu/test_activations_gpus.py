"""Rolls of activations on GPUs: the bodies of tests/ranks over NCCL and symmetric memory."""

from __future__ import annotations

import activation_losses
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_faults
import activations
from activation_strays import OF_ONE_SIZE, assert_tp_ranks_heard, differ_among_tp_ranks
from activations import roll_over
from exact_activations import SEQ_DIM
from rank_bodies import LAYOUTS
from rank_pool import RankPool
from strategies import KINDS, layouts

pytestmark = pytest.mark.multi_gpu
OVER = ("process_group", "symmetric")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("transport", OVER)
@pytest.mark.parametrize("form", SEQ_DIM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
def test_every_row_and_its_gradient_are_those_of_the_definition_on_gpus(
    gpu_pool: RankPool, documents, kind, form, transport
):
    size = gpu_pool.world_size
    for length, num_depths, dtype in ((16, 5, torch.float64), (256, 2, torch.bfloat16)):
        layout = LAYOUTS[documents](length * size, size, kind)
        how = layout, num_depths, form, "ab", dtype, 7, False
        gpu_pool.check(roll_over, size, transport, activations.rows_differ, *how)


@pytest.mark.parametrize("transport", OVER)
@settings(max_examples=5)
@given(data=st.data(), num_depths=st.integers(1, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999))
def test_rows_are_exact_on_any_layout_on_gpus(gpu_pool: RankPool, data, num_depths, dtype, seed, transport):
    layout = data.draw(layouts(cp_sizes=(gpu_pool.world_size,)))
    how = layout, num_depths, "BLH", "ab", dtype, seed, False
    gpu_pool.check(roll_over, layout.cp_size, transport, activations.rows_differ, *how)


@pytest.mark.parametrize("transport", OVER)
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedules_and_runs_give_the_same_bits_on_gpus(gpu_pool: RankPool, documents, dtype, transport):
    size = gpu_pool.world_size
    layout = LAYOUTS[documents](64 * size, size, "zigzag")
    gpu_pool.check(roll_over, size, transport, activations.bits_differ, layout, dtype)


@pytest.mark.parametrize("transport", OVER)
@pytest.mark.parametrize(
    "body",
    [
        activation_losses.wrong_after_passes,
        activation_faults.recompute,
        activation_faults.roll_among_others,
        activation_losses.run_again_after_a_failed_pass,
        activation_losses.run_backward_beside_collectives,
    ],
)
def test_autograd_is_right_on_gpus(gpu_pool: RankPool, body, transport):
    gpu_pool.check(roll_over, gpu_pool.world_size, transport, body)


def test_rows_that_tp_ranks_share_are_those_of_the_definition_on_gpus(gpu_pool: RankPool):
    size = gpu_pool.world_size
    gpu_pool.check(activations.shared_rows_differ, size, [(2, size // 2), (size, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_if_tp_ranks_share_rows_on_gpus(gpu_pool: RankPool, dtype):
    size = gpu_pool.world_size
    if size == 2:
        pytest.skip("a sum of two numbers has one order")
    gpu_pool.check(activations.sums_over_tp_differ, size, dtype, size)


def test_tp_ranks_that_differ_are_an_error_on_all_ranks_of_gpus(gpu_pool: RankPool):
    size = gpu_pool.world_size // 2 * 2
    assert_tp_ranks_heard(gpu_pool.run(differ_among_tp_ranks, size, OF_ONE_SIZE))
