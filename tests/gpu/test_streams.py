"""Streams, events and memory on GPUs: what shows only when the device is behind the host."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import make_roller
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.kernels.launch import Launch

from cases import EXCHANGING, NUM_DEPTHS, error_of
from gpu_cases import TRANSPORTS, differences, packed, shards
from rank_pool import RankPool, device_of

pytestmark = pytest.mark.multi_gpu


def many_from_early_events(group: dist.ProcessGroup, transport: str) -> list[str]:
    """More exchanges than a roller has buffers at first, all under way before the compute stream gets anywhere."""
    layout, rank = packed(group.size(), 1), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batches = [shards(layout, group, turn) for turn in range(12)]
    roller.start(batches[0], layout).at(1)
    ready = torch.cuda.Event()
    ready.record()
    torch.cuda._sleep(50_000_000)
    started = [roller.start(batch, layout, ready) for batch in batches]
    wrong = []
    for turn, rolls in enumerate(started):
        wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_buffers_made_under_way_do_not_wait_for_compute(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(many_from_early_events, size, transport) == [[]] * size


def joined_on_another_stream(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Started on one stream, joined on another, while the first is still at work."""
    layout, rank = packed(group.size(), 2), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    other, wrong = torch.cuda.Stream(), []
    for turn in range(6):
        batch = shards(layout, group, turn)
        ready = torch.cuda.Event()
        ready.record()
        torch.cuda._sleep(10_000_000)
        rolls = roller.start(batch, layout, ready)
        del batch
        with torch.cuda.stream(other):
            wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exchange_may_be_joined_on_another_stream(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(joined_on_another_stream, size, transport) == [[]] * size


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


def dropped_on_one_rank(group: dist.ProcessGroup, transport: str) -> list[str]:
    """One rank drops its rolls and batch while its side stream has yet to read them, and uses the memory again."""
    layout, rank = packed(group.size(), 1), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    roller.start(shards(layout, group, 0), layout).at(1)
    torch.cuda.synchronize()
    side, wrong = exchange_group_of(group).side_stream(device_of(group)), []
    for turn in range(6):
        batch = shards(layout, group, turn)
        shapes = [(one.shape, one.dtype) for one in batch.values()]
        with torch.cuda.stream(side):
            torch.cuda._sleep(30_000_000)
        rolls = roller.start(batch, layout)
        del batch
        if rank == turn % group.size():
            del rolls
            roller.raise_if_failed()
            # `_release` must have kept the allocator from giving the batch's memory to these.
            _ = [torch.full(shape, -5, dtype=dtype, device="cuda") for shape, dtype in 8 * shapes]
        else:
            wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
        torch.cuda.synchronize()
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dropped_exchange_still_sends_what_it_was_given(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(dropped_on_one_rank, size, transport) == [[]] * size


def unroll_fails_once(group: dist.ProcessGroup, transport: str) -> list[str]:
    """The launch of an unroll raises; the same join is asked for again, with other exchanges behind it."""
    layout, rank = packed(group.size(), 2), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    roller.start(shards(layout, group, 0), layout).at(1)
    replay, wrong = Launch.replay, []

    def fails(self: Launch, *args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for turn in range(12):
        rolls = roller.start(shards(layout, group, turn), layout)
        Launch.replay = fails  # type: ignore[method-assign]
        try:
            with pytest.raises(KeyboardInterrupt):
                rolls.at(1)
        finally:
            Launch.replay = replay  # type: ignore[method-assign]
        behind = roller.start(shards(layout, group, turn + 1), layout)
        wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
        wrong += differences([behind.at(1), behind.at(2)], layout, rank, turn + 1)
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_join_that_failed_half_way_is_asked_for_again(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(unroll_fails_once, size, transport) == [[]] * size


def replays_beside_exchanges(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Replays and exchanges outside of the graph take turns, with early events, and the host never waits."""
    layout, rank = packed(group.size(), 0), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batch = shards(layout, group, 0)
    others = [shards(layout, group, 100 + turn) for turn in range(8)]
    tokens = [shards(layout, group, turn) for turn in range(8)]
    roller.start(batch, layout).at(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roller.start(batch, layout)
        rolled = [captured.at(1), captured.at(2)]
    ready = torch.cuda.Event()
    ready.record()
    torch.cuda.synchronize()
    replayed, beside = [], []
    for turn in range(8):
        torch.cuda._sleep(3_000_000 * (1 + (rank + turn) % 2))
        for name, tensor in tokens[turn].items():
            batch[name].copy_(tensor)
        graph.replay()
        replayed.append([{name: t.clone() for name, t in one.items()} for one in rolled])
        eager = roller.start(others[turn], layout, ready)
        beside.append([eager.at(1), eager.at(2)])
    wrong = []
    for turn in range(8):
        wrong += [f"replay: {one}" for one in differences(replayed[turn], layout, rank, turn)]
        wrong += [f"beside: {one}" for one in differences(beside[turn], layout, rank, 100 + turn)]
    graph.reset()
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_replays_and_exchanges_take_turns(gpu_pool: RankPool, transport):
    size = gpu_pool.world_size
    assert gpu_pool.run(replays_beside_exchanges, size, transport) == [[]] * size


def early_event_in_a_capture(group: dist.ProcessGroup, transport: str) -> tuple[str, list[str]]:
    """What is said to an event of before the capture, and whether the roller is of use afterwards."""
    layout, rank = packed(group.size(), 0), group.rank()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batch, errors = shards(layout, group, 0), []
    roller.start(batch, layout).at(1)
    ready = torch.cuda.Event()
    ready.record()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors.append(error_of(lambda: roller.start(batch, layout, ready)))
    rolls = roller.start(batch, layout)
    wrong = differences([rolls.at(1), rolls.at(2)], layout, rank, 0)
    graph.reset()
    roller.close()
    return errors[0], wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_event_of_before_the_capture_is_refused(gpu_pool: RankPool, transport):
    for error, wrong in gpu_pool.run(early_event_in_a_capture, gpu_pool.world_size, transport):
        assert error.startswith("RuntimeError: `ready` must be recorded in the capture"), error
        assert wrong == []


def made_on_another_stream(group: dist.ProcessGroup, schedule: str, transposed: bool) -> list[str]:
    """The batch is made on a stream that nothing waits for, except by the event that the roller is given."""
    layout, rank = packed(group.size(), 1), group.rank()
    roller = make_roller(schedule, group, NUM_DEPTHS)
    roller.start(shards(layout, group, 0), layout).at(1)
    torch.cuda.synchronize()
    other, ready, wrong = torch.cuda.Stream(), torch.cuda.Event(), []
    for turn in range(1, 5):
        made = shards(layout, group, turn)
        batch = {name: torch.zeros_like(t) for name, t in made.items()}
        if transposed:
            batch = {name: t.T.contiguous().T for name, t in batch.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            torch.cuda._sleep(20_000_000)
            for name, tensor in made.items():
                batch[name].copy_(tensor)
            ready.record()
        rolls = roller.start(batch, layout, ready)
        wrong += differences([rolls.at(1), rolls.at(2)], layout, rank, turn)
    roller.close()
    return wrong


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("schedule", EXCHANGING)
def test_a_batch_may_come_from_another_stream(gpu_pool: RankPool, schedule, transposed):
    size = gpu_pool.world_size
    assert gpu_pool.run(made_on_another_stream, size, schedule, transposed) == [[]] * size
