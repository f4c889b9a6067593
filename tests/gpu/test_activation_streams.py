"""Rolls of activations on GPUs, while one of the streams is behind: order between streams, and who owns memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.schedules.activations import make_activation_roller

from activation_faults import said_of_a_late_peer
from cases import copy_late
from exact_activations import Activations
from rank_pool import RankPool, device_of

pytestmark = pytest.mark.multi_gpu
NUM_DEPTHS = 2
LONG = 30_000_000  # cycles, some 15 ms


def batch_of(group: dist.ProcessGroup, turn: int) -> Activations:
    """Each turn has other documents, so that maps are made for it."""
    bounds = [0, 4 + 2 * turn, 24, 40]
    layout = SequenceLayout.packed([2 * group.size() * one for one in bounds], group.size())
    return Activations.of(group, layout, NUM_DEPTHS, names="a", seed=turn)


def delay_side_stream(group: dist.ProcessGroup) -> None:
    with torch.cuda.stream(exchange_group_of(group).side_stream(device_of(group))):
        torch.cuda._sleep(LONG)


def from_an_earlier_event(group: dist.ProcessGroup, transport: str) -> list[str]:
    """The side stream is late with the maps; or the rolls get memory that the compute stream has yet to write."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    wrong = []
    for turn in range(6):
        batch, ready = batch_of(group, turn), torch.cuda.Event()
        tensors = batch.shards()
        ready.record()
        if turn % 2:
            delay_side_stream(group)
        else:
            used = [torch.empty_like(tensors["a"]) for _ in range(8)]
            torch.cuda._sleep(LONG)
            for one in used:
                one.fill_(1)
            del one, used
        rolls = roller.start(tensors, batch.layout, ready)
        wrong += batch.wrong_rolls([rolls.at(depth) for depth in (1, 2)])
    roller.close()
    return wrong


def made_on_another_stream(group: dist.ProcessGroup, transport: str) -> list[str]:
    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    other, wrong = torch.cuda.Stream(), []
    for turn in range(4):
        batch, ready = batch_of(group, turn), torch.cuda.Event()
        made = batch.shards()
        late = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
        copy_late(made, late, other, ready)
        rolls = roller.start(late, batch.layout, ready)
        rolled = [rolls.at(depth) for depth in (1, 2)]
        torch.cuda.synchronize()
        wrong += batch.wrong_rolls(rolled)
    roller.close()
    return wrong


def waited_for_on_another_stream(group: dist.ProcessGroup, transport: str) -> list[str]:
    """What the exchange leaves is used again on the stream that it was started from, before the other one reads it."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    other, wrong = torch.cuda.Stream(), []
    for turn in range(4):
        batch = batch_of(group, turn)
        tensors = batch.shards()
        like = torch.empty_like(tensors["a"])
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        rolls = roller.start(tensors, batch.layout)
        del tensors
        with torch.cuda.stream(other):
            torch.cuda._sleep(2 * LONG)
            rolled = [rolls.at(depth) for depth in (1, 2)]
        del rolls
        fills = [torch.full_like(like, -5) for _ in range(12)]
        torch.cuda.synchronize()
        wrong += batch.wrong_rolls(rolled)
        del fills
    roller.close()
    return wrong


def written_to(shape: torch.Size, dtype: torch.dtype, device: torch.device, turn: int) -> list[str]:
    """Use memory again that may have this shape. Say whether anything else still writes to it."""
    fills = [torch.full(shape, -5, dtype=dtype, device=device) for _ in range(12)]
    torch.cuda.synchronize()
    return [f"written to at turn {turn}" for fill in fills if not (fill == -5).all()]


def dropped_on_one_rank(group: dist.ProcessGroup, transport: str) -> list[str]:
    """One rank drops its rolls and batch while its side stream has yet to write them, and uses the memory again."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    wrong = []
    for turn in range(6):
        batch = batch_of(group, turn)
        tensors = batch.shards()
        like = tensors["a"]
        shape, dtype, device = like.shape, like.dtype, like.device
        delay_side_stream(group)
        rolls = roller.start(tensors, batch.layout)
        del tensors, like
        if group.rank() == turn % group.size():
            del rolls
            wrong += written_to(shape, dtype, device, turn)
        else:
            wrong += batch.wrong_rolls([rolls.at(depth) for depth in (1, 2)])
    roller.close()
    return wrong


def given_up_in_backward(group: dist.ProcessGroup, transport: str) -> list[str]:
    """A backward ends between the two halves of an exchange, while the side stream has yet to write the sums."""

    def give_up(_: torch.Tensor) -> None:
        raise InterruptedError

    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    wrong = []
    for turn in range(4):
        batch = batch_of(group, turn)
        tensor = batch.shards()["a"].requires_grad_() * 1
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        rolls = roller.start({"a": tensor}, batch.layout)
        between = tensor * 2
        between.register_hook(give_up)
        rolled = [rolls.at(depth)["a"] for depth in (1, 2)]
        wrong += batch.wrong_rolls([{"a": one.detach()} for one in rolled])
        del rolls, tensor
        delay_side_stream(group)
        try:
            torch.autograd.backward([*rolled, between], [torch.ones_like(one) for one in (*rolled, between)])
            wrong.append("nothing was raised")
        except InterruptedError:
            del rolled, between
        wrong += written_to(shape, dtype, device, turn)
    roller.close()
    return wrong


def added_to_another_tensor(group: dist.ProcessGroup, transport: str) -> list[str]:
    """Autograd gives the gradient of a sum to both parts, and adds to it what else belongs to the other one."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS, transport=transport)
    wrong = []
    for turn in range(4):
        batch = batch_of(group, turn)
        leaf = batch.shards()["a"].requires_grad_()
        others = [leaf.detach().clone().requires_grad_() * 1 for _ in range(NUM_DEPTHS)]
        rolls = roller.start({"a": leaf * 1}, batch.layout)
        later = [one * 2 for one in others]  # their gradients come between backward of `at` and of `start`
        sums = [(rolls.at(depth)["a"] + one) * 1 for depth, one in enumerate(others, start=1)]
        weights = [batch.weight("a", depth) for depth in range(1, NUM_DEPTHS + 1)]
        delay_side_stream(group)
        torch.autograd.backward([*sums, *later], [*weights, *map(torch.ones_like, later)])
        wrong += batch.wrong_gradients({"a": leaf.grad}, lambda rank, name, depth: int(depth > 0))
    roller.close()
    return wrong


@pytest.mark.parametrize("transport", ["process_group", "symmetric"])
@pytest.mark.parametrize(
    "body",
    [
        from_an_earlier_event,
        made_on_another_stream,
        waited_for_on_another_stream,
        dropped_on_one_rank,
        given_up_in_backward,
        added_to_another_tensor,
    ],
)
def test_rows_are_right_while_a_stream_is_behind(gpu_pool: RankPool, body, transport):
    gpu_pool.check(body, gpu_pool.world_size, transport)


@pytest.mark.parametrize("skipped", ["forward", "backward"])
def test_a_late_peer_over_symmetric_memory_is_named(gpu_pool: RankPool, skipped):
    said, nothing = gpu_pool.run(said_of_a_late_peer, 2, skipped)
    assert nothing == ""
    assert "cp rank 0 of 2 gave up waiting for the activations of cp rank 1" in said
    assert said.endswith("; it was a backward, which every rank must run") == (skipped == "backward")
