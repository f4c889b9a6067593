"""Layouts whose bounds are on the GPU: exact, without a wait, in graphs, and illegal ones."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from overlap_mtp import DeviceLayout, SequenceLayout, make_roller

import rank_bodies
from cases import NUM_DEPTHS, PACKED, TRANSPORTS, Microbatch, error_of, packed
from rank_bodies import LAYOUTS, device_layout_of
from rank_pool import RankPool, device_of
from strategies import KINDS, layouts

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", ["packed", "padded"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rolls_are_exact(gpu_pool: RankPool, transport, documents, kind):
    size = gpu_pool.world_size
    layout = LAYOUTS[documents](64 * size, size, kind)
    gpu_pool.check(rank_bodies.mixed_rolls_differ, size, layout, transport, True, PACKED)


@settings(max_examples=8)
@given(data=st.data(), on_device=st.booleans())
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rolls_are_exact_on_any_layout(gpu_pool: RankPool, transport, data, on_device):
    size = gpu_pool.world_size
    layout = data.draw(layouts(cp_sizes=(size,)))
    gpu_pool.check(
        rank_bodies.mixed_rolls_differ, size, layout, transport, on_device and layout.is_packed, PACKED
    )


def start_under_a_long_kernel(group: dist.ProcessGroup, transport: str) -> bool:
    """Whether an exchange starts and joins while the GPU is still busy with what came before."""
    batch = Microbatch.of(group)
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport, 8)
    shards = batch.shards()
    for _ in range(3):
        roller.start(shards, device_layout_of(batch.layout, device_of(group))).at(NUM_DEPTHS)
    layout = device_layout_of(batch.layout, device_of(group))
    torch.cuda.synchronize()
    dist.barrier(group)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    slept = torch.cuda.Event()
    slept.record()
    rolls = roller.start(shards, layout)
    rolls.at(1), rolls.at(2)
    went_on = not slept.query()
    torch.cuda.synchronize()
    roller.close()
    return went_on


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_waits_for_the_device(gpu_pool: RankPool, transport):
    assert all(gpu_pool.run(start_under_a_long_kernel, gpu_pool.world_size, transport))


def replay_with_other_bounds(group: dist.ProcessGroup, schedule: str, transport: str) -> list[str]:
    """Replays of a graph read the bounds that are in the tensors then."""
    first = Microbatch.of(group)
    roller = make_roller(schedule, group, NUM_DEPTHS, transport, 8)
    tensors = first.shards()
    cu_seqlens = torch.zeros(8, dtype=torch.int32, device=device_of(group))

    def set_bounds(layout: SequenceLayout) -> None:
        cu_seqlens.fill_(layout.seq_len)
        cu_seqlens[: layout.cu_seqlens.size].copy_(torch.from_numpy(layout.cu_seqlens))

    set_bounds(first.layout)
    layout = DeviceLayout(cu_seqlens, first.layout.seq_len, first.layout.cp_size)
    wrong = first.wrong(roller.start(tensors, layout))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roller.start(tensors, layout)
        rolled = [captured.at(1), captured.at(2)]
    for turn in range(4):
        batch = Microbatch.of(group, turn, turn)
        set_bounds(batch.layout)
        for name, tensor in batch.shards().items():
            tensors[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        wrong += [f"replay {turn}: {one}" for one in batch.differences(rolled)]
    error = error_of(captured.set_replay_layout, first.layout)
    if "write new ones there" not in error:
        wrong.append(error)
    graph.reset()
    del graph
    gc.collect()
    torch.cuda.synchronize()
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("schedule", PACKED)
def test_a_captured_exchange_reads_the_bounds_again(gpu_pool: RankPool, schedule, transport):
    gpu_pool.check(replay_with_other_bounds, gpu_pool.world_size, schedule, transport)


def start_with_illegal_bounds(group: dist.ProcessGroup, transport: str) -> str:
    """The error of a roller that was given bounds which no rank can cut."""
    roller, batch = make_roller("prefetch", dist.new_group(), 1, transport, 8), Microbatch.of(group)
    bounds = torch.tensor([0, 3, batch.layout.seq_len], device=device_of(group))
    layout = DeviceLayout(bounds, batch.layout.seq_len, group.size())
    legal = replace(layout, cu_seqlens=torch.tensor([0, 0, batch.layout.seq_len], device=device_of(group)))
    shards = batch.shards()  # copies from the host wait for the device, and so does the first use of a roller
    roller.start(shards, legal).at(1)
    torch.cuda._sleep(200_000_000)  # `start` and `at` return before the device finds out
    rolled = roller.start(shards, layout).at(1)
    torch.cuda.synchronize()
    assert all(torch.equal(rolled[name], tensor) for name, tensor in shards.items())
    return error_of(roller.raise_if_failed)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_illegal_bounds_are_reported(gpu_pool: RankPool, transport):
    for error in gpu_pool.run(start_with_illegal_bounds, gpu_pool.world_size, transport):
        assert "the bounds of a DeviceLayout are illegal" in error
        assert error.startswith("RuntimeError")


def start_with_different_bounds(group: dist.ProcessGroup, transport: str) -> str:
    """The error of a rank whose documents are not those of its peers."""
    cp_group = dist.new_group()
    roller = make_roller("prefetch", cp_group, 1, transport, 8)
    batch = Microbatch(cp_group, packed(group.size(), group.rank() % 2), Microbatch.of(group).full)
    layout = device_layout_of(batch.layout, device_of(group))

    def roll() -> None:
        roller.start(batch.shards(), layout).at(1)  # raises if the device is ahead of the host by then
        torch.cuda.synchronize()
        roller.raise_if_failed()

    return error_of(roll)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_with_different_bounds_find_out(gpu_pool: RankPool, transport):
    for error in gpu_pool.run(start_with_different_bounds, gpu_pool.world_size, transport):
        assert "another plan" in error
