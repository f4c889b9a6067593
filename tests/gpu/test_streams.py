"""Streams, events and memory on GPUs: what shows only if the host runs ahead of the device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import make_roller
from overlap_mtp.exchange import outputs
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.kernels.launch import Launch

from cases import EXCHANGING, NUM_DEPTHS, TRANSPORTS, Microbatch, copy_late, error_of
from rank_pool import RankPool, device_of

pytestmark = pytest.mark.multi_gpu


def recorded_event() -> torch.cuda.Event:
    """An event of all that the current stream has been given so far."""
    ready = torch.cuda.Event()
    ready.record()
    return ready


def many_from_early_events(group: dist.ProcessGroup, transport: str) -> list[str]:
    """More exchanges than a roller has buffers at first, all under way before the compute stream gets anywhere."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batches = [Microbatch.of(group, 1, turn) for turn in range(12)]
    shards = [batch.shards() for batch in batches]
    layout = batches[0].layout
    roller.start(shards[0], layout).at(1)
    ready = recorded_event()
    torch.cuda._sleep(50_000_000)
    started = [roller.start(tensors, layout, ready) for tensors in shards]
    wrong = []
    for batch, rolls in zip(batches, started, strict=True):
        wrong += batch.wrong(rolls)
    roller.close()
    return wrong


def waited_for_on_another_stream(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Started on one stream, waited for on another, while the first is still at work."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    other, wrong = torch.cuda.Stream(), []
    for turn in range(6):
        batch = Microbatch.of(group, 2, turn)
        tensors = batch.shards()
        ready = recorded_event()
        torch.cuda._sleep(10_000_000)
        rolls = roller.start(tensors, batch.layout, ready)
        del tensors
        with torch.cuda.stream(other):
            wrong += batch.wrong(rolls)
    roller.close()
    return wrong


def from_an_earlier_event(group: dist.ProcessGroup, transport: str) -> list[str]:
    """The exchange may begin before what the stream was given last; a tensor that has to be copied may not."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    wrong = []
    for turn in range(4):
        batch = Microbatch.of(group, 1, turn)
        tensors = batch.shards()
        ready = recorded_event()
        torch.cuda._sleep(20_000_000)
        if turn == 3:  # the same tokens, not contiguous: the copy is made after the sleep
            tensors = {name: t.T.contiguous().T for name, t in tensors.items()}
        wrong += batch.wrong(roller.start(tensors, batch.layout, ready))
    roller.close()
    return wrong


def into_memory_that_is_still_used(group: dist.ProcessGroup, transport: str) -> list[str]:
    """New memory for rolls was another tensor's, which the compute stream has yet to write."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    wrong = []
    for turn in range(3):
        batch = Microbatch.of(group, 1, turn)
        tensors, ready = batch.shards(), recorded_event()
        # All that was allocated at a time, but for what the turn before has used.
        taken = [roller.start(tensors, batch.layout) for _ in range(outputs.MICROBATCHES - bool(turn))]
        rolled = [rolls.at(depth) for rolls in taken for depth in range(1, NUM_DEPTHS + 1)]
        torch.cuda._sleep(20_000_000)
        for one in (tensor for tokens in rolled for tensor in tokens.values()):
            one.fill_(1)
        del one, taken, rolled
        wrong += batch.wrong(roller.start(tensors, batch.layout, ready))
    roller.close()
    return wrong


def dropped_on_one_rank(group: dist.ProcessGroup, transport: str) -> list[str]:
    """One rank drops its rolls and batch while its side stream has yet to use them, and uses the memory again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outputs, "MICROBATCHES", 1)  # the rolls of a microbatch have memory of their own
        return drop_in_turn(group, transport)


def drop_in_turn(group: dist.ProcessGroup, transport: str) -> list[str]:
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    Microbatch.of(group, 1).start(roller).at(1)
    torch.cuda.synchronize()
    side, wrong = exchange_group_of(group).side_stream(device_of(group)), []
    for turn in range(6):
        batch = Microbatch.of(group, 1, turn)
        tensors = batch.shards()
        # Of the batch, and of all its rolls.
        shapes = [
            ((rows * one.shape[0], *one.shape[1:]), one.dtype)
            for one in tensors.values()
            for rows in (1, NUM_DEPTHS)
        ]
        with torch.cuda.stream(side):
            torch.cuda._sleep(30_000_000)
        rolls = roller.start(tensors, batch.layout)
        del tensors
        fills = []
        if group.rank() == turn % group.size():
            del rolls
            roller.raise_if_failed()
            # `_release` must have kept the allocator from giving their memory to these.
            fills = [torch.full(shape, 1, dtype=dtype, device="cuda") for shape, dtype in 8 * shapes]
        else:
            wrong += batch.wrong(rolls)
        torch.cuda.synchronize()
        wrong += [f"written to at turn {turn}" for fill in fills if not (fill == 1).all()]
    roller.close()
    return wrong


def many_dropped_after_one_join(group: dist.ProcessGroup, transport: str) -> list[str]:
    """A join is held up. Exchanges start before it ends, more than there are buffers, and nobody joins them."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batch = Microbatch.of(group, 1)
    tensors = batch.shards()
    roller.start(tensors, batch.layout).at(1)
    torch.cuda.synchronize()
    wrong = []
    for _ in range(2):
        ready = recorded_event()
        rolls = roller.start(tensors, batch.layout, ready)
        torch.cuda._sleep(50_000_000)
        rolled = [rolls.at(1), rolls.at(2)]
        for _ in range(150):
            roller.start(tensors, batch.layout, ready)
        wrong += batch.differences(rolled)
    wrong += batch.wrong(roller.start(tensors, batch.layout))
    roller.close()
    return wrong


def join_fails_once(group: dist.ProcessGroup, transport: str) -> list[str]:
    """What a join does last raises. `at` is called again, with other exchanges after it."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    Microbatch.of(group, 2).start(roller).at(1)
    last = (Launch, "replay") if transport == "process_group" else (torch.cuda.Stream, "wait_event")
    wrong = []

    def fails(self: object, *args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for turn in range(12):
        batch, after = (Microbatch.of(group, 2, turn + more) for more in range(2))
        rolls = batch.start(roller)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(*last, fails)
            with pytest.raises(KeyboardInterrupt):
                rolls.at(1)
        rolls_after = after.start(roller)
        wrong += batch.wrong(rolls) + after.wrong(rolls_after)
    roller.close()
    return wrong


def replays_beside_exchanges(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Replays and exchanges outside of the graph take turns, with early events, and the host never waits."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    first = Microbatch.of(group)
    layout, tensors = first.layout, first.shards()
    others = [Microbatch.of(group, 0, 100 + turn) for turn in range(8)]
    replays = [Microbatch.of(group, 0, turn) for turn in range(8)]
    tokens_of_others, tokens_of_replays = ([one.shards() for one in some] for some in (others, replays))
    roller.start(tensors, layout).at(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roller.start(tensors, layout)
        rolled = [captured.at(1), captured.at(2)]
    ready = recorded_event()
    torch.cuda.synchronize()
    replayed, beside = [], []
    for turn in range(8):
        torch.cuda._sleep(3_000_000 * (1 + (group.rank() + turn) % 2))
        for name, tensor in tokens_of_replays[turn].items():
            tensors[name].copy_(tensor)
        graph.replay()
        replayed.append([{name: t.clone() for name, t in one.items()} for one in rolled])
        eager = roller.start(tokens_of_others[turn], layout, ready)
        beside.append([eager.at(1), eager.at(2)])
    wrong = []
    for turn in range(8):
        wrong += [f"replay: {one}" for one in replays[turn].differences(replayed[turn])]
        wrong += [f"beside: {one}" for one in others[turn].differences(beside[turn])]
    graph.reset()
    roller.close()
    return wrong


def early_events_after_a_capture(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Batches are made on a stream that nothing waits for but their events. A graph holds another exchange."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    first = Microbatch.of(group)
    layout, tensors = first.layout, first.shards()
    roller.start(tensors, layout).at(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        roller.start(tensors, layout).at(1)
    graph.replay()
    other, wrong = torch.cuda.Stream(), []
    for turn in range(3):
        batch, ready = Microbatch.of(group, 0, turn), torch.cuda.Event()
        made = batch.shards()
        late = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
        copy_late(made, late, other, ready)
        rolls = roller.start(late, layout, ready)
        rolled = [rolls.at(1), rolls.at(2)]
        torch.cuda.synchronize()
        wrong += batch.differences(rolled)
    graph.reset()
    roller.close()
    return wrong


def early_event_in_a_capture(group: dist.ProcessGroup, transport: str) -> list[str]:
    """An event of before the capture is refused, and the roller is of use afterwards."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport)
    batch, errors = Microbatch.of(group), []
    tensors = batch.shards()
    roller.start(tensors, batch.layout).at(1)
    ready = recorded_event()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors.append(error_of(roller.start, tensors, batch.layout, ready))
    wrong = batch.wrong(roller.start(tensors, batch.layout))
    graph.reset()
    roller.close()
    expected = "RuntimeError: `ready` must be recorded in the capture"
    return wrong + [error for error in errors if not error.startswith(expected)]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "body",
    [
        many_from_early_events,
        waited_for_on_another_stream,
        into_memory_that_is_still_used,
        from_an_earlier_event,
        dropped_on_one_rank,
        many_dropped_after_one_join,
        join_fails_once,
        replays_beside_exchanges,
        early_events_after_a_capture,
        early_event_in_a_capture,
    ],
)
def test_rolls_are_right_while_the_device_is_behind(gpu_pool: RankPool, body, transport):
    gpu_pool.check(body, gpu_pool.world_size, transport)


def made_on_another_stream(group: dist.ProcessGroup, schedule: str, transposed: bool) -> list[str]:
    """The batch is made on a stream that nothing waits for, except by the event that the roller is given."""
    roller = make_roller(schedule, group, NUM_DEPTHS)
    Microbatch.of(group, 1).start(roller).at(1)
    torch.cuda.synchronize()
    other, ready, wrong = torch.cuda.Stream(), torch.cuda.Event(), []
    for turn in range(1, 5):
        batch = Microbatch.of(group, 1, turn)
        made = batch.shards()
        tensors = {name: torch.zeros_like(t) for name, t in made.items()}
        if transposed:
            tensors = {name: t.T.contiguous().T for name, t in tensors.items()}
        copy_late(made, tensors, other, ready)
        wrong += batch.wrong(roller.start(tensors, batch.layout, ready))
    roller.close()
    return wrong


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("schedule", EXCHANGING)
def test_a_batch_may_come_from_another_stream(gpu_pool: RankPool, schedule, transposed):
    gpu_pool.check(made_on_another_stream, gpu_pool.world_size, schedule, transposed)
