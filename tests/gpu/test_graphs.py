"""Exchanges inside CUDA graphs, and what only symmetric memory can get wrong."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_roller
from overlap_mtp.kernels.launch import Grid, Launch

from cases import NUM_DEPTHS, PACKED, TRANSPORTS, Microbatch, error_of
from rank_bodies import said_of_a_rank_that_stays_away
from rank_pool import RankPool

pytestmark = pytest.mark.multi_gpu


def replay_with_other_documents(group: dist.ProcessGroup, schedule: str, transport: str) -> list[str]:
    """Captured once; replayed with other tokens, then with other documents, between exchanges outside of it."""
    first = Microbatch.of(group)
    roller = make_roller(schedule, group, NUM_DEPTHS, transport, max_documents=8)
    tensors = first.shards()
    wrong = first.wrong(roller.start(tensors, first.layout))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = roller.start(tensors, first.layout)
        rolled = [captured.at(1), captured.at(2)]
    for turn in range(6):
        batch, eager = (Microbatch.of(group, turn // 2, shift) for shift in (turn, 9))
        if turn % 2 == 0 and turn:
            captured.set_replay_layout(batch.layout)
        for name, tensor in batch.shards().items():
            tensors[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        wrong += [f"replay {turn}: {one}" for one in batch.differences(rolled)]
        wrong += eager.wrong(eager.start(roller))
    graph.reset()
    del graph
    gc.collect()
    torch.cuda.synchronize()
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("schedule", PACKED)
def test_a_captured_exchange_takes_other_tokens_and_documents(gpu_pool: RankPool, schedule, transport):
    gpu_pool.check(replay_with_other_documents, gpu_pool.world_size, schedule, transport)


class Cycle:
    """Something that only the garbage collector frees."""

    def __init__(self, kept: object) -> None:
        self.kept, self.itself = kept, self


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


launch_kernel = Launch.__call__


def collecting(launch: Launch, grid: Grid | None = None) -> None:
    """A launch in which the garbage collector runs, so also while that launch is captured."""
    gc.collect()
    launch_kernel(launch, grid)


def used_roller(group: dist.ProcessGroup, transport: str, is_closed: bool) -> list[object]:
    """A roller and the rolls of one of its exchanges, on a device that has done with them."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport, max_documents=8)
    rolls = Microbatch.of(group).start(roller)
    rolls.at(1)
    torch.cuda.synchronize()
    if is_closed:
        roller.close()
    return [roller, rolls]


def go_during_captures(group: dist.ProcessGroup, transport: str, is_closed: bool) -> list[str]:
    """The garbage collector takes rollers while the transport captures its launches, and while the caller captures.

    Once in the thread that captures, once in another one.
    """
    batch, wrong = Microbatch.of(group), []
    tensors = batch.shards()
    for in_another in (False, True):
        roller = make_roller("prefetch", group, NUM_DEPTHS, transport, max_documents=8)
        gc.disable()
        Cycle(used_roller(group, transport, is_closed))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Launch, "__call__", collecting)
            rolls = roller.start(tensors, batch.layout)
        gc.enable()
        wrong += batch.wrong(rolls)
        kept = used_roller(group, transport, is_closed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rolls = roller.start(tensors, batch.layout)
            rolled = [rolls.at(1), rolls.at(2)]
            Cycle(kept)
            del kept
            in_a_thread(gc.collect) if in_another else gc.collect()
        graph.replay()
        torch.cuda.synchronize()
        wrong += [f"replay: {one}" for one in batch.differences(rolled)]
        graph.reset()
        del graph, rolls, rolled
        Cycle(roller)
        del roller
    gc.collect()
    return wrong


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_transports_may_go_during_a_capture(gpu_pool: RankPool, transport, is_closed):
    gpu_pool.check(go_during_captures, gpu_pool.world_size, transport, is_closed)


def replay_without_the_roller(group: dist.ProcessGroup, transport: str) -> list[str]:
    """What is wrong with a replay if nothing but the graph is left of the roller, and others were made since."""
    batch = Microbatch.of(group)
    tensors = batch.shards()
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport, max_documents=8)
    roller.start(tensors, batch.layout).at(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rolls = roller.start(tensors, batch.layout)
        rolled = [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
    del roller, rolls
    gc.collect()
    wrong = []
    for shift in (100, 200):
        other = Microbatch.of(group, shift=shift)
        wrong += other.wrong(
            other.start(make_roller("batched", group, NUM_DEPTHS, transport, max_documents=8))
        )
    for one in rolled:
        for tensor in one.values():
            tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    wrong += batch.differences(rolled)
    graph.reset()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_graph_outlives_a_roller_that_nobody_closes(gpu_pool: RankPool, transport):
    gpu_pool.check(replay_without_the_roller, gpu_pool.world_size, transport)


def new_replay_layout(group: dist.ProcessGroup) -> str:
    batch, roller = Microbatch.of(group), make_roller("prefetch", group, NUM_DEPTHS)
    rolls = batch.start(roller)
    error = error_of(rolls.set_replay_layout, batch.layout)
    rolls.at(1)
    roller.close()
    return error


def test_only_a_captured_exchange_takes_another_layout(gpu_pool: RankPool):
    for error in gpu_pool.run(new_replay_layout, gpu_pool.world_size):
        assert error.startswith("RuntimeError: only")


def misused_captures(group: dist.ProcessGroup, transport: str) -> tuple[dict[str, str], list[str]]:
    """What is said to exchanges that a graph cannot hold; and what is wrong with the roller afterwards."""
    roller = make_roller("prefetch", group, NUM_DEPTHS, transport, max_documents=8)
    batch, errors = Microbatch.of(group), {}
    layout, tensors = batch.layout, batch.shards()
    roller.start(tensors, layout).at(1)
    outside = roller.start(tensors, layout)
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    with torch.cuda.graph(graphs[0]):
        captured = roller.start(tensors, layout)
        errors["RuntimeError: exchange 1 must be joined"] = error_of(outside.at, 1)
        captured.at(1)
    wrong = batch.wrong(outside)

    def capture_too_many() -> None:
        with torch.cuda.graph(graphs[1]):
            for _ in range(20):
                roller.start(tensors, layout).at(1)

    errors["RuntimeError: no buffers are left"] = error_of(capture_too_many)
    contiguous = SequenceLayout.packed(layout.cu_seqlens, group.size(), "contiguous")
    longer = SequenceLayout.packed(2 * layout.cu_seqlens, group.size())
    for other, what in ((contiguous, "kind"), (longer, "length")):
        error = error_of(captured.set_replay_layout, other)
        errors[f"ValueError: a captured exchange keeps its {what}"] = error
    wrong += batch.wrong(roller.start(tensors, layout))
    with torch.cuda.graph(graphs[2]):
        again = roller.start(tensors, layout)
        rolled = [again.at(1), again.at(2)]
    graphs[2].replay()
    torch.cuda.synchronize()
    wrong += batch.differences(rolled)
    roller.raise_if_failed()
    for one in graphs:
        one.reset()
    del one
    graphs.clear()
    gc.collect()
    torch.cuda.synchronize()
    roller.close()
    return errors, wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_a_graph_cannot_hold_is_refused(gpu_pool: RankPool, transport):
    for errors, wrong in gpu_pool.run(misused_captures, gpu_pool.world_size, transport):
        assert [error for expected, error in errors.items() if not error.startswith(expected)] == []
        assert wrong == []


def test_a_rank_that_never_comes_is_named(gpu_pool: RankPool):
    answers = gpu_pool.run(said_of_a_rank_that_stays_away, gpu_pool.world_size)
    gave_up = f"gave up waiting for the tokens of cp rank {gpu_pool.world_size - 1}"
    said = [answer for answer in answers if answer and gave_up in answer[0]]
    assert said, answers
    assert said == [[first] * 3 for first, *_ in said]


def chosen_transport(group: dist.ProcessGroup) -> tuple[str, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("overlap_mtp")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    fresh = dist.new_group(list(range(group.size())))
    assert fresh is not None
    for _ in range(2):
        roller = make_roller("prefetch", fresh, NUM_DEPTHS)
        Microbatch.of(fresh).start(roller).at(1)
        name = roller.transport
        roller.close()
    logger.removeHandler(handler)
    return name, messages


def test_auto_says_once_what_it_has_chosen_and_why(gpu_pool: RankPool):
    answers = gpu_pool.run(chosen_transport, gpu_pool.world_size)
    assert len({name for name, _ in answers}) == 1
    assert answers[0][0] in TRANSPORTS
    assert len(answers[0][1]) == 1
    assert answers[0][0] in answers[0][1][0]
    assert all(not messages for _, messages in answers[1:])
