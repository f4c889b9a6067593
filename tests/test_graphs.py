"""Exchanges inside CUDA graphs, and what only symmetric memory can get wrong."""

from __future__ import annotations

import gc
import logging
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_roller, roll_reference
from overlap_mtp.channel import channel_of

from cases import WIRED, error_of, full_batch
from rank_pool import RankPool, device_of
from strategies import same_bits

pytestmark = pytest.mark.multi_gpu
NUM_DEPTHS = 2
TRANSPORTS = ("process_group", "symmetric")
TOKENS = 32  # a rank


def packed(cp_size: int, variant: int) -> SequenceLayout:
    """Documents of other lengths, one of them empty, in the same stream length."""
    unit, total = 2 * cp_size, TOKENS // 2
    cuts = [[0, 1, 1, 5, total], [0, 7, total], [0, 2, 3, 4, 9, total]][variant % 3]
    return SequenceLayout.packed([cut * unit for cut in cuts], cp_size)


def shards(layout: SequenceLayout, group: dist.ProcessGroup, shift: int) -> dict[str, torch.Tensor]:
    full = {name: tensor + shift for name, tensor in full_batch(layout).items()}
    return {n: layout.shard(t, group.rank()).to(device_of(group)) for n, t in full.items()}


def differences(
    rolled: list[dict[str, torch.Tensor]], layout: SequenceLayout, rank: int, shift: int
) -> list[str]:
    wrong = []
    for depth, tensors in enumerate(rolled, start=1):
        for name, tensor in full_batch(layout).items():
            expected = layout.shard(roll_reference(tensor + shift, layout, depth), rank)
            if not same_bits(tensors[name].cpu(), expected):
                wrong.append(f"{name} at depth {depth}, shift {shift}")
    return wrong


def replay_with_other_documents(group: dist.ProcessGroup, schedule: str, transport: str) -> list[str]:
    """Captured once; replayed with other tokens, then with other documents, between exchanges outside of it."""
    rank, first = group.rank(), packed(group.size(), 0)
    roller = make_roller(schedule, group, NUM_DEPTHS, transport, max_documents=8)
    batch = shards(first, group, 0)
    rolls = roller.start(batch, first)
    wrong = differences([rolls.at(1), rolls.at(2)], first, rank, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roller.start(batch, first)
        rolled = [captured.at(1), captured.at(2)]
    for turn in range(6):
        layout = packed(group.size(), turn // 2)
        if turn % 2 == 0 and turn:
            captured.relayout(layout)
        for name, tensor in shards(layout, group, turn).items():
            batch[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        wrong += [f"replay {turn}: {one}" for one in differences(rolled, layout, rank, turn)]
        eager = roller.start(shards(layout, group, 9), layout)
        wrong += differences([eager.at(1), eager.at(2)], layout, rank, 9)
    graph.reset()
    del graph
    gc.collect()
    torch.cuda.synchronize()
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("schedule", WIRED)
def test_a_captured_exchange_takes_other_tokens_and_documents(gpu_pool: RankPool, schedule, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(replay_with_other_documents, size, schedule, transport) == [[]] * size


def relayouts(group: dist.ProcessGroup) -> list[str]:
    layout = packed(group.size(), 0)
    roller = make_roller("prefetch", group, NUM_DEPTHS)
    rolls = roller.start(shards(layout, group, 0), layout)
    errors = [error_of(lambda: rolls.relayout(layout))]
    rolls.at(1)
    roller.close()
    return errors


def test_only_a_captured_exchange_takes_another_layout(gpu_pool: RankPool):
    for (error,) in gpu_pool.run(relayouts, gpu_pool.world_size):
        assert error.startswith("RuntimeError: only")


def from_an_earlier_event(group: dist.ProcessGroup, transport: str) -> list[str]:
    """The exchange may begin before what the stream was given last; a tensor that has to be copied may not."""
    layout, rank = packed(group.size(), 1), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    wrong = []
    for turn in range(4):
        batch = shards(layout, group, turn)
        ready = torch.cuda.Event()
        ready.record()
        torch.cuda._sleep(20_000_000)
        if turn == 3:  # the same tokens, not contiguous: the copy is made behind the sleep
            batch = {name: t.T.contiguous().T for name, t in batch.items()}
        rolls = roller.start(batch, layout, ready)
        wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exchange_may_begin_where_its_batch_is_ready(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(from_an_earlier_event, size, transport) == [[]] * size


def too_many_under_way(group: dist.ProcessGroup) -> str:
    layout = packed(group.size(), 0)
    roller = make_roller("prefetch", group, NUM_DEPTHS, "symmetric")
    batch, flights = shards(layout, group, 0), []

    def start_many() -> None:
        for _ in range(70):
            flights.append(roller.start(batch, layout))

    error = error_of(start_many)
    for rolls in flights:
        rolls.at(1)
    roller.close()
    return f"{len(flights)} {error}"


def test_more_exchanges_than_slots_are_refused(gpu_pool: RankPool):
    for answer in gpu_pool.run(too_many_under_way, gpu_pool.world_size):
        assert answer.startswith("64 RuntimeError: exchange 0 must be joined"), answer


def late_rank(world: dist.ProcessGroup) -> str:
    """What the others see of a rank that stays away from the second exchange."""
    group = dist.new_group(list(range(world.size())), timeout=timedelta(seconds=3))
    assert group is not None
    assert channel_of(group).group is not None
    layout = packed(group.size(), 0)
    roller = make_roller("prefetch", group, NUM_DEPTHS, "symmetric")
    batch = shards(layout, group, 0)
    roller.start(batch, layout).at(1)
    torch.cuda.synchronize()
    if group.rank() == group.size() - 1:
        return ""

    def wait_in_vain() -> None:
        roller.start(batch, layout).at(1)
        torch.cuda.synchronize()
        roller.start(batch, layout)

    return error_of(wait_in_vain)


def test_a_rank_that_never_comes_is_named(gpu_pool: RankPool):
    answers = gpu_pool.run(late_rank, gpu_pool.world_size)
    gpu_pool.restart()
    late = gpu_pool.world_size - 1
    assert any(f"gave up waiting for the tokens of cp rank {late}" in answer for answer in answers), answers


def chosen_transport(group: dist.ProcessGroup) -> tuple[str, list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("overlap_mtp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    fresh = dist.new_group(list(range(group.size())))
    assert fresh is not None
    layout = packed(group.size(), 0)
    for _ in range(2):
        roller = make_roller("prefetch", fresh, NUM_DEPTHS)
        roller.start(shards(layout, group, 0), layout).at(1)
        name = roller.transport
        roller.close()
    logger.removeHandler(handler)
    return name, records


def test_auto_says_once_what_it_has_chosen_and_why(gpu_pool: RankPool):
    answers = gpu_pool.run(chosen_transport, gpu_pool.world_size)
    assert len({name for name, _ in answers}) == 1
    assert answers[0][0] in TRANSPORTS
    assert len(answers[0][1]) == 1
    assert answers[0][0] in answers[0][1][0]
    assert all(not records for _, records in answers[1:])
