"""Rolls on GPUs: the bodies of tests/ranks over NCCL and over symmetric memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp import SCHEDULES, make_roller

import rank_bodies
from cases import PACKED, TRANSPORTS, Microbatch, error_of
from rank_bodies import LAYOUTS, LIFETIMES, OWNERSHIP, with_delays
from rank_pool import RankPool
from strategies import ALL_DTYPES, KINDS, dtype_choices, layouts

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("num_depths", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rolls_are_exact_on_gpus(gpu_pool: RankPool, transport, documents, kind, num_depths):
    size = gpu_pool.world_size
    for length in (16, 1024):
        layout = LAYOUTS[documents](length * size, size, kind)
        gpu_pool.check(rank_bodies.rolls_differ, size, layout, num_depths, 2, ALL_DTYPES, 7, transport)


@settings(max_examples=10)  # each one compiles its kernels
@given(data=st.data(), num_depths=st.integers(1, 3), dtypes=dtype_choices, seed=st.integers(0, 999))
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rolls_are_exact_on_any_layout_on_gpus(gpu_pool: RankPool, transport, data, num_depths, dtypes, seed):
    layout = data.draw(layouts(cp_sizes=(gpu_pool.world_size,)))
    gpu_pool.check(rank_bodies.rolls_differ, layout.cp_size, layout, num_depths, 2, dtypes, seed, transport)


def test_rolls_are_exact_in_a_device_mesh_on_gpus(gpu_pool: RankPool):
    gpu_pool.check(rank_bodies.rolls_differ_in_a_default_group, gpu_pool.world_size)


def test_roll_tensor_keeps_the_contract_on_gpus(gpu_pool: RankPool):
    for dims, shifts in [(-1, -1), (0, -1), (-1, -5)]:
        gpu_pool.check(rank_bodies.roll_tensor_differs, gpu_pool.world_size, dims, shifts)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("body", [*LIFETIMES, rank_bodies.gradients_differ])
def test_lifetimes_hold_on_gpus(gpu_pool: RankPool, body, transport, schedule):
    """What gloo orders by waiting on the host, CUDA must order by events."""
    gpu_pool.check(with_delays, gpu_pool.world_size, transport, body, schedule)


@pytest.mark.parametrize(
    ("first", "second"), [("prefetch", "prefetch"), ("overlap", "prefetch"), ("merged", "sync")]
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_rollers_share_a_cp_group_on_gpus(gpu_pool: RankPool, transport, first, second):
    gpu_pool.check(with_delays, gpu_pool.world_size, transport, rank_bodies.interleave, first, second)


@pytest.mark.parametrize("schedule", PACKED)
@pytest.mark.parametrize("body", OWNERSHIP)
def test_tensors_are_the_callers_on_gpus(gpu_pool: RankPool, body, schedule):
    gpu_pool.check(body, gpu_pool.world_size, schedule)


def start_on_another_gpu(group: dist.ProcessGroup) -> str:
    """The error of a first batch that all ranks have on rank 0's GPU."""
    roller, batch = make_roller("prefetch", dist.new_group(), 1), Microbatch.of(group)
    elsewhere = {name: tensor.to("cuda:0") for name, tensor in batch.shards().items()}
    return error_of(roller.start, elsewhere, batch.layout)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ranks share a GPU")
def test_a_batch_on_another_gpu_is_refused(gpu_pool: RankPool):
    """Its kernels would run on the current GPU."""
    for error in gpu_pool.run(start_on_another_gpu, gpu_pool.world_size):
        assert error.startswith("ValueError: cp rank 1: the batch must be on the current device cuda:1")
