"""What outlives what: rollers leave nothing behind, and rolled tensors stay as they were handed out."""

from __future__ import annotations

import functools
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from overlap_mtp import SCHEDULES, Rolls, SequenceLayout, make_roller, pad_documents, prepare, roll_reference
from overlap_mtp.exchange.spec import fill_of

from rank_pool import RankPool, device_of
from strategies import DTYPES, random_tensor, same_bits

NAMES = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")
NUM_DEPTHS = 3
GPU_TRANSPORTS = ("process_group", "symmetric")


def layout_of(cp_size: int, variant: int = 0) -> SequenceLayout:
    """Packed, padded, with an empty document and chunks shorter than NUM_DEPTHS; one length for all variants."""
    lengths = [[5 * cp_size, 0, 1, 7], [1, 9, 0, 3 * cp_size], [0, 2 * cp_size, 2 * cp_size, 3]][variant % 3]
    return pad_documents([torch.zeros(n) for n in lengths], cp_size, seq_len=24 * cp_size)[1]


def full_batch(layout: SequenceLayout, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_tensor((2, layout.seq_len), dtype, generator)
        for name, dtype in zip(NAMES, DTYPES, strict=True)
    }


def local(group: dist.ProcessGroup, schedule: str, full: dict[str, torch.Tensor], layout: SequenceLayout):
    if schedule == "prepared":
        full = prepare(full, layout, NUM_DEPTHS)
    return {name: layout.shard(t, group.rank()).to(device_of(group)) for name, t in full.items()}


def wrong_rolls(group, rolls: Rolls, full: dict[str, torch.Tensor], layout: SequenceLayout) -> list[str]:
    """Names and depths that differ from the oracle."""
    wrong = []
    for depth in range(1, NUM_DEPTHS + 1):
        rolled = rolls.at(depth)
        for name, tensor in full.items():
            expected = layout.shard(roll_reference(tensor, layout, depth, fill_of(name)), group.rank())
            if not same_bits(rolled[name].cpu(), expected):
                wrong.append(f"{name} at depth {depth}")
    return wrong


def held_resources() -> dict[str, int]:
    return {
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "threads": len(os.listdir("/proc/self/task")),
        "file descriptors": len(os.listdir("/proc/self/fd")),
    }


def make_use_and_close(group: dist.ProcessGroup, count: int, use_every: int) -> tuple[dict, dict, list[str]]:
    """Resources after the first roller and after all, and what was rolled wrongly meanwhile."""
    layout = layout_of(group.size())
    wrong: list[str] = []
    after_first: dict[str, int] = {}
    for i in range(count):
        schedule = SCHEDULES[i // use_every % len(SCHEDULES)]
        roller = make_roller(schedule, group, NUM_DEPTHS)
        if i % use_every == 0:
            full = full_batch(layout, i)
            rolls = roller.start(local(group, schedule, full, layout), layout)
            wrong += wrong_rolls(group, rolls, full, layout)
        roller.close()
        after_first = after_first or held_resources()
    return after_first, held_resources(), wrong


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts what /proc lists")
def test_a_thousand_rollers_leak_nothing(pool: RankPool):
    for after_first, after_all, wrong in pool.run(make_use_and_close, 2, 1000, 50):
        assert after_all == after_first
        assert wrong == []


VOCABULARY, WIDTH = 23, 4


def accumulated_gradients(group: dist.ProcessGroup, schedule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding's gradient from the roller's ids, and from the oracle's.

    Three microbatches run forward, twenty more come and go, and only then do the three run backward.
    """
    rank, device = group.rank(), device_of(group)
    layouts = [layout_of(group.size(), i) for i in range(3)]
    generator = torch.Generator().manual_seed(3)

    def tokens() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCABULARY, (2, layouts[0].seq_len), generator=generator)
        return {"input_ids": ids, "labels": ids.flip(0)}

    fulls = [tokens() for _ in layouts]
    shape = (len(layouts), NUM_DEPTHS, 2, layouts[0].local_len, WIDTH)
    # Whole numbers in float64: their sums are exact in any order.
    factors = torch.randint(-9, 10, shape, generator=generator).double().to(device)
    weight = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64, device=device, requires_grad=True)

    roller = make_roller(schedule, group, NUM_DEPTHS)
    started = [
        roller.start(local(group, schedule, full, layout), layout)
        for full, layout in zip(fulls, layouts, strict=True)
    ]
    losses = []
    for rolls, of_microbatch in zip(started, factors, strict=True):
        embedded = [F.embedding(rolls.at(depth)["input_ids"], weight) for depth in range(1, NUM_DEPTHS + 1)]
        losses.append(sum((e * f).sum() for e, f in zip(embedded, of_microbatch, strict=True)))
    del started, rolls, embedded
    for i in range(20):
        other = roller.start(local(group, schedule, tokens(), layouts[i % 3]), layouts[i % 3])
        for depth in range(1, NUM_DEPTHS + 1):
            other.at(depth)
    for loss in losses:
        loss.backward()
    roller.close()

    expected = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64, device=device)
    for full, layout, of_microbatch in zip(fulls, layouts, factors, strict=True):
        for depth in range(1, NUM_DEPTHS + 1):
            ids = layout.shard(roll_reference(full["input_ids"], layout, depth), rank).to(device)
            expected.index_add_(0, ids.flatten(), of_microbatch[depth - 1].flatten(0, 1))
    assert weight.grad is not None
    return weight.grad.cpu(), expected.cpu()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cp_size", [2, 3])
def test_gradients_accumulate_over_microbatches(pool: RankPool, cp_size, schedule):
    """A saved index that is overwritten moves an embedding's gradient to another row without a word."""
    for gradient, expected in pool.run(accumulated_gradients, cp_size, schedule):
        assert expected.abs().max() > 0
        assert torch.equal(gradient, expected)


def keep_early_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Which rolled tensors of four microbatches changed while twenty others came and went."""
    layouts = [layout_of(group.size(), i) for i in range(3)]
    roller = make_roller(schedule, group, NUM_DEPTHS)
    kept = []
    for i in range(24):
        layout = layouts[i % 3]
        rolls = roller.start(local(group, schedule, full_batch(layout, i), layout), layout)
        rolled = {(i, name, d): t for d in range(1, NUM_DEPTHS + 1) for name, t in rolls.at(d).items()}
        if i < 4:
            kept += [(what, tensor, tensor.clone()) for what, tensor in rolled.items()]
        del rolls
    roller.close()
    return [str(what) for what, tensor, copy in kept if not same_bits(tensor, copy)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rolled_tensors_are_never_overwritten(pool: RankPool, schedule):
    assert pool.run(keep_early_rolls, 2, schedule) == [[]] * 2


def join_late(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Five microbatches in flight, joined newest first, each depth of all before the next depth of any."""
    layouts = [layout_of(group.size(), i) for i in range(5)]
    roller = make_roller(schedule, group, NUM_DEPTHS)
    fulls = [full_batch(layout, i) for i, layout in enumerate(layouts)]
    started = [
        roller.start(local(group, schedule, full, layout), layout)
        for full, layout in zip(fulls, layouts, strict=True)
    ]
    for depth in range(1, NUM_DEPTHS + 1):
        for rolls in reversed(started):
            rolls.at(depth)
    wrong = []
    for full, layout, rolls in zip(fulls, layouts, started, strict=True):
        wrong += wrong_rolls(group, rolls, full, layout)
    roller.close()
    return wrong


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_microbatches_are_joined_in_any_order(pool: RankPool, schedule):
    assert pool.run(join_late, 3, schedule) == [[]] * 3


def drop_rolls(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """Rolls never joined, or only at depth 1, between others that are: what is wrong with the others."""
    roller = make_roller(schedule, group, NUM_DEPTHS)
    wrong = []
    for i in range(30):
        layout = layout_of(group.size(), i)
        full = full_batch(layout, i)
        rolls = roller.start(local(group, schedule, full, layout), layout)
        if i % 3 == 0:
            wrong += [f"microbatch {i}: {one}" for one in wrong_rolls(group, rolls, full, layout)]
        elif i % 3 == 1:
            rolls.at(1)
        del rolls
    roller.close()
    return wrong


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropped_rolls_do_no_harm(pool: RankPool, schedule):
    assert pool.run(drop_rolls, 3, schedule) == [[]] * 3


def close_in_flight(group: dist.ProcessGroup, schedule: str) -> list[str]:
    """A roller closed with microbatches in flight, again and again: what is wrong with the next roller's."""
    layout = layout_of(group.size())
    wrong = []
    for i in range(5):
        abandoned = make_roller(schedule, group, NUM_DEPTHS)
        for _ in range(3):
            abandoned.start(local(group, schedule, full_batch(layout, 100), layout), layout)
        abandoned.close()
        roller = make_roller(schedule, group, NUM_DEPTHS)
        full = full_batch(layout, i)
        wrong += wrong_rolls(group, roller.start(local(group, schedule, full, layout), layout), full, layout)
        roller.close()
    return wrong


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_roller_closed_in_flight_does_no_harm(pool: RankPool, schedule):
    assert pool.run(close_in_flight, 2, schedule) == [[]] * 2


def interleave(group: dist.ProcessGroup, first: str, second: str) -> list[str]:
    """Two rollers of one cp group, each with three microbatches in flight among the other's."""
    rollers = [make_roller(first, group, NUM_DEPTHS), make_roller(second, group, NUM_DEPTHS)]
    wrong = []
    started = []
    for i in range(6):
        layout = layout_of(group.size(), i)
        full = full_batch(layout, i)
        schedule = (first, second)[i % 2]
        started.append((rollers[i % 2].start(local(group, schedule, full, layout), layout), full, layout))
    for depth in range(1, NUM_DEPTHS + 1):
        for rolls, _, _ in started:
            rolls.at(depth)
    rollers[0].close()
    for rolls, full, layout in started[1::2]:
        wrong += wrong_rolls(group, rolls, full, layout)
    layout, full = layout_of(group.size()), full_batch(layout_of(group.size()), 99)
    rolls = rollers[1].start(local(group, second, full, layout), layout)
    wrong += wrong_rolls(group, rolls, full, layout)
    for rolls, full, layout in started[::2]:
        wrong += wrong_rolls(group, rolls, full, layout)
    rollers[1].close()
    return wrong


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("prefetch", "prefetch"),
        ("prefetch", "sync"),
        ("overlap", "prefetch"),
        ("sync", "overlap"),
        ("merged", "overlap"),
        ("prepared", "merged"),
    ],
)
def test_two_rollers_share_a_cp_group(pool: RankPool, first, second):
    assert pool.run(interleave, 3, first, second) == [[]] * 3


def with_delays(group: dist.ProcessGroup, transport: str, function, *args):
    """Runs a function of this file over a transport, every exchange delayed on its stream, by up to 2 ms before
    and after it."""
    from overlap_mtp.exchange.nccl import NcclTransport
    from overlap_mtp.exchange.symmetric import SymmetricTransport

    rng = random.Random(group.rank())
    kinds = (NcclTransport, SymmetricTransport)
    sends = [kind._send for kind in kinds]

    def delayed(send):
        def late(self, buffers, number):
            torch.cuda._sleep(rng.randrange(4_000_000))
            send(self, buffers, number)
            torch.cuda._sleep(rng.randrange(4_000_000))

        return late

    for kind, send in zip(kinds, sends, strict=True):
        kind._send = delayed(send)
    globals()["make_roller"] = functools.partial(make_roller, transport=transport)
    try:
        return function(group, *args)
    finally:
        globals()["make_roller"] = make_roller.func
        for kind, send in zip(kinds, sends, strict=True):
            kind._send = send


@pytest.mark.multi_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transport", GPU_TRANSPORTS)
@pytest.mark.parametrize("function", [keep_early_rolls, join_late, drop_rolls, close_in_flight])
def test_lifetimes_hold_on_gpus(gpu_pool: RankPool, function, transport, schedule):
    """What gloo orders by waiting on the host, CUDA must order by events."""
    size = gpu_pool.world_size
    assert gpu_pool.run(with_delays, size, transport, function, schedule) == [[]] * size


@pytest.mark.multi_gpu
@pytest.mark.parametrize("transport", GPU_TRANSPORTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_accumulate_over_microbatches_on_gpus(gpu_pool: RankPool, transport, schedule):
    results = gpu_pool.run(with_delays, gpu_pool.world_size, transport, accumulated_gradients, schedule)
    for gradient, expected in results:
        assert expected.abs().max() > 0
        assert torch.equal(gradient, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("first", "second"), [("prefetch", "prefetch"), ("overlap", "prefetch"), ("merged", "sync")]
)
@pytest.mark.parametrize("transport", GPU_TRANSPORTS)
def test_two_rollers_share_a_cp_group_on_gpus(gpu_pool: RankPool, transport, first, second):
    size = gpu_pool.world_size
    assert gpu_pool.run(with_delays, size, transport, interleave, first, second) == [[]] * size


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_closed_roller_is_refused(schedule):
    layout = layout_of(1)
    full = prepare(full_batch(layout, 0), layout, NUM_DEPTHS)
    roller = make_roller(schedule, None, NUM_DEPTHS)
    roller.start(full, layout).at(1)
    roller.close()
    with pytest.raises((RuntimeError, ValueError), match="closed"):
        roller.start(full, layout)
    roller.close()
