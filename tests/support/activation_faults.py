"""What ranks do with rolls of activations when their steps are not those of their peers, or end before their end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from overlap_mtp import Roller, Rolls, SequenceLayout, make_roller
from overlap_mtp.exchange.row_transport import RowTransport
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller
from overlap_mtp.schedules.timed import TimedRoller

from activations import ends_of, gradients_of, leaves_of, run_backward, wrong_rows
from cases import ODD_RANK, Microbatch, error_of, short_patience
from exact_activations import Activations, Tensors
from strategies import same_bits

NUM_DEPTHS = 2


def batch_of(group: dist.ProcessGroup, seed: int = 0, documents: int = 3) -> Activations:
    bounds = [*(0, 4, 12, 16)[:documents], 24]
    layout = SequenceLayout.packed([2 * group.size() * one for one in bounds], group.size())
    return Activations.of(group, layout, NUM_DEPTHS, seed=seed)


# Steps that end before their end, on all ranks.


class Fails(torch.autograd.Function):
    """The identity. Its backward raises."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise InterruptedError


def start(batch: Activations, roller: Roller, leaves: Tensors) -> tuple[Tensors, Rolls]:
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    return tensors, roller.start(tensors, batch.layout)


def drop_before_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    start(batch, roller, leaves)


def raise_before_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    _tensors, _rolls = start(batch, roller, leaves)
    raise InterruptedError


def drop_after_at(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    start(batch, roller, leaves)[1].at(NUM_DEPTHS)


def raise_before_gradients_leave(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    _, rolls = start(batch, roller, leaves)
    Fails.apply(rolls.at(1)["a"]).sum().backward()


def raise_before_gradients_arrive(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    """What is computed between `start` and `at` fails in backward."""
    tensors, rolls = start(batch, roller, leaves)
    trunk = Fails.apply(tensors["a"])
    (trunk.sum() + rolls.at(1)["a"].sum()).backward()


def raise_after_gradients_arrive(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    tensors = {name: Fails.apply(leaf) for name, leaf in leaves.items()}
    roller.start(tensors, batch.layout).at(1)["a"].sum().backward()


def roll_under_no_grad(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    with torch.no_grad():
        _, rolls = start(batch, roller, leaves)
        rolled = [rolls.at(depth) for depth in (1, 2)]
    assert batch.wrong_rolls(rolled) == []
    assert not any(roll.requires_grad for by_name in rolled for roll in by_name.values())


def roll_leaves(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    rolls = roller.start(leaves, batch.layout)
    run_backward(batch, leaves, [rolls.at(depth) for depth in (1, 2)])


def drop_rolls_of_leaves(batch: Activations, roller: Roller, leaves: Tensors) -> None:
    roller.start(leaves, batch.layout)


UNFINISHED = [
    *(drop_before_at, raise_before_at, drop_after_at, raise_before_gradients_leave),
    *(raise_before_gradients_arrive, raise_after_gradients_arrive, roll_under_no_grad),
    *(roll_leaves, drop_rolls_of_leaves),
]


@contextlib.contextmanager
def few_objects() -> Iterator[None]:
    """The garbage collector looks at new objects alone: thousands of modules would take it a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def num_tensors() -> int:
    """Tensors that were made inside of `few_objects`."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@few_objects()
def leaks(
    group: dist.ProcessGroup, schedules: tuple[str, ...] = ACTIVATION_SCHEDULES, steps: int = 6
) -> list[str]:
    """What unfinished steps leave behind, and what is wrong with the steps after them."""
    wrong = []
    for schedule in schedules:
        roller = make_activation_roller(schedule, group, NUM_DEPTHS)
        batch, others = batch_of(group, documents=1), [batch_of(group, seed, 1) for seed in range(2)]
        leaves = leaves_of(batch)
        held: list[int] = []
        for step in range(steps if schedule == "overlap" else 3):
            for unfinished in UNFINISHED:
                with contextlib.suppress(InterruptedError):
                    unfinished(batch, roller, leaves)
                found = wrong_rows(others[step % 2], roller)
                wrong += [f"{schedule}, after {unfinished.__name__}: {one}" for one in found]
            for leaf in leaves.values():
                leaf.grad = None
            held.append(num_tensors())
        if len({*held[1:]}) > 1:
            wrong.append(f"{schedule}: the number of tensors became {held}")
        hooks = sum(len(leaf._backward_hooks or {}) for leaf in leaves.values())
        if hooks:
            wrong.append(f"{schedule}: {hooks} hooks")
        roller.close()
    return wrong


@without_collector()
def what_outlives_a_step(group: dist.ProcessGroup) -> list[str]:
    """Objects of a step that live after it, without the help of the garbage collector."""
    alive = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        leaves = leaves_of(batch)
        for has_backward in (True, False):
            tensors, rolls = start(batch, roller, leaves)
            rolled = [rolls.at(depth) for depth in (1, 2)]
            watched = {"rolls": rolls, "tensor": tensors["a"], "roll": rolled[0]["a"]}
            graph = rolls._backward  # type: ignore[attr-defined]
            watched |= {"graph": graph, "exchange": graph.exchange, "buffer": graph.exchange.buffer}
            references = {name: weakref.ref(one) for name, one in watched.items()}
            if has_backward:
                run_backward(batch, tensors, rolled)
            del tensors, rolls, rolled, watched, graph
            alive += [f"{schedule}: {name}" for name, one in references.items() if one() is not None]
        roller.close()
    return alive


@few_objects()
def close_with_exchanges_under_way(group: dist.ProcessGroup) -> list[str]:
    """What rollers leave behind that are closed with exchanges under way, and what is wrong with the next rollers."""
    wrong, held = [], []
    for number in range(6):
        batch = batch_of(group, number)
        abandoned = make_activation_roller("overlap", group, NUM_DEPTHS)
        for _ in range(3):
            rolls = abandoned.start(batch.shards(), batch.layout)
        abandoned.close()
        wrong += [error_of(rolls.at, 1), error_of(abandoned.start, batch.shards(), batch.layout)]
        del rolls
        roller = make_activation_roller("overlap", group, NUM_DEPTHS)
        wrong += wrong_rows(batch, roller)
        roller.close()
        held.append(num_tensors())
    wrong = [one for one in wrong if one != "RuntimeError: this roller is closed"]
    return [*wrong, f"the number of tensors became {held}"] if len({*held[1:]}) > 1 else wrong


def gradients_that_change(group: dist.ProcessGroup) -> list[str]:
    """Whether gradients of rolls change before their exchange has ended: the side stream may still read them."""
    batch, roller = batch_of(group), make_activation_roller("overlap", group, NUM_DEPTHS)
    begin, end, read = RowTransport.begin_backward, RowTransport.end_backward, {}

    def memory(at: int, size: int) -> bytes:
        """Without a reference to the tensor: that would keep autograd from adding to it."""
        return ctypes.string_at(at, size)

    def begin_backward(self: RowTransport, exchange: Any, gradients: list[list[torch.Tensor]]) -> Any:
        for one in (gradient for depth in gradients for gradient in depth):
            read[one.data_ptr()] = memory(one.data_ptr(), one.nbytes)
        return begin(self, exchange, gradients)

    def end_backward(self: RowTransport, exchange: Any) -> list[torch.Tensor]:
        changed.extend(at for at, before in read.items() if memory(at, len(before)) != before)
        return end(self, exchange)

    changed: list[int] = []
    with mock.patch.multiple(RowTransport, begin_backward=begin_backward, end_backward=end_backward):
        leaves = leaves_of(batch)
        others = [(depth, name, leaf * 3) for depth in (1, 2) for name, leaf in leaves.items()]
        rolls = roller.start({name: leaf * 1 for name, leaf in leaves.items()}, batch.layout)
        # Their gradients come between backward of `at` and of `start`.
        ends = [one * 2 for _, _, one in others]
        ends += [(rolls.at(depth)[name] + one) * 2 for depth, name, one in others]
        torch.autograd.backward(ends, [torch.ones_like(one) for one in ends])
    roller.close()
    assert len(read) == 2 * NUM_DEPTHS
    return [f"{len(changed)} gradients changed"] if changed else []


# Steps of several microbatches and rollers


def recompute(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with layers that are computed again in backward, and take the rolls as inputs."""
    wrong = []
    for schedule in ACTIVATION_SCHEDULES:
        batch, roller = batch_of(group), make_activation_roller(schedule, group, NUM_DEPTHS)
        found: dict[str, tuple[list[torch.Tensor], tuple[int, int]]] = {}
        for how in ("kept", "recomputed", "recomputed, reentrant"):
            messages, leaves = roller.traffic.messages, leaves_of(batch)
            computed = []

            def layer(
                hidden: torch.Tensor, ahead: torch.Tensor, computed: list[int] = computed
            ) -> torch.Tensor:
                computed.append(1)
                return torch.tanh(hidden + ahead * ahead)

            tensors, rolls = start(batch, roller, leaves)
            hidden = tensors["a"]
            for depth in (1, 2):
                inputs = hidden, rolls.at(depth)["a"]
                reentrant = how.endswith("reentrant")
                hidden = (
                    layer(*inputs) if how == "kept" else checkpoint(layer, *inputs, use_reentrant=reentrant)
                )
            (hidden * batch.weight("a", 0)).sum().backward()
            messages = roller.traffic.messages - messages
            found[how] = [leaves["a"].grad, hidden.detach()], (messages, len(computed))
        bits, (messages, times) = found["kept"]
        for how, (others, counts) in found.items():
            if not all(map(same_bits, bits, others)):
                wrong.append(f"{schedule}, {how}: other bits")
            if counts != (messages, times * (1 if how == "kept" else 2)) or messages == 0:
                wrong.append(f"{schedule}, {how}: (messages, layers) {counts} after {messages, times}")
        roller.close()
    return wrong


def roll_among_others(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with microbatches under way of several rollers, of tokens and activations, on one group.

    The number of documents changes. Rolls are taken in another order than they were started in.
    """
    wrong = []
    of_tokens = [make_roller(schedule, group, NUM_DEPTHS) for schedule in ("prefetch", "sync")]
    rollers = [make_activation_roller(one, group, NUM_DEPTHS) for one in (*ACTIVATION_SCHEDULES, "overlap")]
    timed = [TimedRoller(roller) for roller in rollers]
    for step in range(4):
        under_way = []
        for number, roller in enumerate(timed):
            batch = batch_of(group, step + number, documents=1 + (step + number) % 4)
            tokens = Microbatch.of(group, variant=step + number)
            leaves = leaves_of(batch)
            under_way.append(
                (batch, leaves, *start(batch, roller, leaves), tokens, tokens.start(of_tokens[number % 2]))
            )
        order = under_way if step % 2 else under_way[::-1]
        rolled = {}
        for depth in (1, 2) if step < 2 else (2, 1):
            for number, (_, _, _, rolls, _, token_rolls) in enumerate(order):
                rolled[number, depth] = rolls.at(depth)
                token_rolls.at(depth)
        ends = []
        for number, (batch, _, tensors, _, tokens, token_rolls) in enumerate(order):
            mine = [rolled[number, depth] for depth in (1, 2)]
            wrong += batch.wrong_rolls(mine) + tokens.wrong(token_rolls)
            ends.append((batch, tensors, mine))
        if step == 0:  # one backward for all
            losses = [
                (roll * batch.weight(name, depth)).sum()
                for batch, tensors, mine in ends
                for depth, by_name in enumerate([tensors, *mine])
                for name, roll in by_name.items()
            ]
            torch.stack(losses).sum().backward()
        else:
            for end in ends[::-1] if step == 1 else ends:
                run_backward(*end)
        for batch, leaves, *_ in order:
            wrong += batch.wrong_gradients(gradients_of(leaves))
    if any(one.read().host_us <= 0 or one.begun != 4 * 3 for one in timed):
        wrong.append("a TimedRoller counts otherwise")
    for roller in (*rollers, *of_tokens):
        roller.close()
    return wrong


def run_backward_of_several_microbatches(group: dist.ProcessGroup) -> list[str]:
    """Run backward once for three microbatches. The odd rank uses the rolls of only one of them."""
    roller = make_activation_roller("overlap", group, NUM_DEPTHS)
    batches = [batch_of(group, seed) for seed in range(3)]
    leaves = [leaves_of(batch) for batch in batches]
    started = [start(batch, roller, mine) for batch, mine in zip(batches, leaves, strict=True)]
    ends, wrong = [], []
    for number, (batch, (tensors, rolls)) in enumerate(zip(batches, started, strict=True)):
        rolled = [rolls.at(depth) for depth in (1, 2)]
        depths = [tensors] if group.rank() == ODD_RANK and number != 1 else [tensors, *rolled]
        ends += ends_of(batch, depths)
    torch.autograd.backward(*zip(*ends, strict=True))
    for number, (batch, mine) in enumerate(zip(batches, leaves, strict=True)):

        def times(rank: int, name: str, depth: int, number: int = number) -> int:
            return int(depth == 0 or number == 1 or rank != ODD_RANK)

        wrong += [f"microbatch {number}: {one}" for one in batch.wrong_gradients(gradients_of(mine), times)]
    roller.close()
    return wrong


def said_of_a_late_peer(group: dist.ProcessGroup, skipped: str) -> str:
    """What ranks raise if the last one skips a direction of an exchange, over symmetric memory."""
    from overlap_mtp.exchange import row_symmetric

    own = dist.new_group(list(range(group.size())))  # ranks out of step need another one
    with short_patience(row_symmetric, own):
        roller = make_activation_roller("overlap", own, 2)
        batch = batch_of(own)
        assert wrong_rows(batch, roller) == []
    is_late = own.rank() == own.size() - 1
    said = ""
    try:
        if not (is_late and skipped == "forward"):
            leaves = {name: tensor.requires_grad_() for name, tensor in batch.shards().items()}
            rolls = roller.start({name: leaf * 1 for name, leaf in leaves.items()}, batch.layout)
            rolled = [*rolls.at(1).values(), *rolls.at(2).values()]
            if not is_late:
                torch.autograd.backward(rolled, [torch.ones_like(one) for one in rolled])
            torch.cuda.synchronize()
            roller.raise_if_failed()
    except RuntimeError as error:
        said = str(error)
    if said:
        assert error_of(roller.raise_if_failed) == f"RuntimeError: {said}"  # at each call
    with contextlib.suppress(RuntimeError):
        roller.close()
    return said
