"""Rolls of activations: differentiable, and exact in their gradients on the rank that owns each row.

Tokens are known when the batch arrives. Activations are born in the middle of a step, and their gradients must travel
back. So there are two exchanges: one leaves at `start` and is waited for at the first `at`; the other leaves in
backward of `at` and is waited for in backward of `start`. Between the two lies the compute that hides them.

- sync: a blocking message for each tensor, depth and document, in both directions;
- merged: a blocking message for each depth;
- overlap: one message for all depths, on the side stream;
- none: no exchange. It returns zeros in place of the rows of peers and is for timing only.

All add up the same numbers in the same order: sync, merged and overlap give the same bits.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.group import ExchangeGroup, exchange_group_of
from overlap_mtp.exchange.row_spec import RowSpec, is_plain, plain
from overlap_mtp.exchange.row_transport import BACKWARD, EXPECTS_GRADIENTS, RowExchange, RowTransport
from overlap_mtp.exchange.rows import make_row_plans
from overlap_mtp.exchange.select import TRANSPORTS, make_row_transport
from overlap_mtp.exchange.spec import Batch, roll_options
from overlap_mtp.exchange.transport import PendingExchange, Transport, TransportConfig
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.packed import PackedRoller
from overlap_mtp.schedules.roller import Roller, RollerConfig, Rolls, Tokens
from overlap_mtp.tensors import IGNORE_INDEX

ACTIVATION_SCHEDULES = ("sync", "merged", "overlap")
WITH_NONE = (*ACTIVATION_SCHEDULES, "none")
JOINED = 1  # added to the mark of a microbatch when its rolls are taken
NO_PASS = -1  # in place of the number of a backward pass


def make_activation_roller(
    schedule: str,
    cp_group: dist.ProcessGroup | None,
    num_depths: int,
    max_documents: int = 128,
    seq_dim: int = 1,
    tp_group: dist.ProcessGroup | None = None,
    transport: str = "auto",
    check_layouts: bool = False,
) -> Roller:
    """Make a roller of activations. It communicates nothing: that begins with the first `start`.

        rolls = roller.start({"embeddings": embeddings}, layout)   # where they are born, or soon after
        ...
        ahead = rolls.at(depth)["embeddings"]                      # [B, L, H], differentiable

    Row i of the roll at depth k is row i + k if that is a valid token of the same document, else 0. Gradients arrive at
    the tensors that `start` was given, on the rank that owns the row. Call `start` and `at` outside of recomputed
    functions, and give these the rolls as inputs: then backward sends nothing a second time.

    If one rank of the cp group gives tensors that need gradients and runs backward through them, all must. They take
    the rolls of their exchanges, that is the first `at` of each, in the same order: it sets the order of backward. With
    sync and merged every rank must take them.

    A loss need not use the rolls, if it uses every tensor and none of them is a leaf, or the rolls live until backward.
    It must (times 0, if they do not count) if a step has several exchanges; or if layers have collectives in backward
    and the schedule is sync or merged or there are tp ranks. Otherwise ranks may wait for each other in turn.

    Args:
        schedule: "sync", "merged" or "overlap" ("none" sends nothing, for timing only).
        cp_group: the ranks that share a sequence; None for one rank that holds everything.
        num_depths: how many depths `at` will be asked for.
        max_documents: as in `make_roller`. It sizes the messages: about 3 * num_depths rows for a document.
        seq_dim: the sequence dimension of the tensors: 1 for [B, L, H], 0 for [L, B, H] or [L, H].
        tp_group: the tensor-parallel ranks, if each holds a slice of its cp rank's rows (sequence parallelism). Their
            slices lie one after the other, in rank order.
        transport: as in `make_roller`. Symmetric memory is for "overlap" without a tp group: "auto" takes it then.
        check_layouts: of sync: compare each microbatch over the cp ranks at `start`, where it is sent, and in backward,
            by a small message that waits for the device. The other schedules always compare, at no cost.

    Returns:
        The roller. Its batches hold float64, float32, bfloat16 or float16, one dtype in each batch.

    Raises:
        ValueError: if the schedule or the transport is unknown or they do not go together, or a size is below 1.
    """
    if schedule not in WITH_NONE:
        raise ValueError(
            f"schedule of activations must be one of {', '.join(ACTIVATION_SCHEDULES)}, got {schedule!r}"
        )
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    shared = exchange_group_of(tp_group) if tp_group is not None and tp_group.size() > 1 else None
    if transport == "symmetric" and (schedule != "overlap" or shared):
        raise ValueError("symmetric memory carries activations of schedule overlap, without a tp group")
    if seq_dim not in (0, 1):
        raise ValueError(f"seq_dim must be 0 or 1, got {seq_dim}")
    options = roll_options(num_depths, max_documents, IGNORE_INDEX, None, None)
    checks = check_layouts and schedule == "sync"
    config = RollerConfig(schedule, exchange_group_of(cp_group), transport, options, IGNORE_INDEX, checks)
    return ActivationRoller(config, seq_dim, shared)


class ActivationRoller(PackedRoller):
    """A roller whose rolls are differentiable."""

    reads_device_bounds = False

    def __init__(self, config: RollerConfig, seq_dim: int, tp_group: ExchangeGroup | None) -> None:
        super().__init__(config)
        self.backward_stopwatch: AbstractContextManager[None] = contextlib.nullcontext()  # around its calls
        self._tp_group = tp_group
        self._tp = (tp_group.cp_rank, tp_group.cp_size) if tp_group else (0, 1)
        self._spec_of = partial(
            RowSpec.of,
            group=self._group,
            schedule=self.name,
            transport=config.transport,
            options=config.options,
            seq_dim=seq_dim,
            tp_size=self._tp[1],
        )

    def _make_transport(self, spec: RowSpec, layout: Layout) -> Transport:
        assert isinstance(layout, SequenceLayout)
        plans = make_row_plans(layout, self.num_depths, self.max_documents, self.name == "merged", self._tp)
        tokens = [one.tokens for one in plans]
        config = TransportConfig(
            self._group, tokens, spec, self.traffic, self.is_overlapped, layout.local_len
        )
        return make_row_transport(config, plans, self._tp_group)

    def _refuse(self) -> None:
        with contextlib.suppress(RuntimeError):  # the refused batch's own error says more
            super()._refuse()

    def _start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None) -> Rolls:
        assert isinstance(self._transport, RowTransport)
        self._layout = layout
        if self.refusal is not None or self._transport.failure:
            self.check_in_step()
        has_gradients = torch.is_grad_enabled() and any(one.requires_grad for one in batch.values())
        mark = self.mark + EXPECTS_GRADIENTS * has_gradients
        assert isinstance(layout, SequenceLayout)
        self.compare(layout, mark)
        return ActivationRolls(self, self._transport, batch, layout, ready, mark)


class ActivationRolls(Rolls):
    """The rolls of one exchange. Autograd sees two functions: one at `start`, one at the first `at`."""

    def __init__(
        self,
        roller: ActivationRoller,
        transport: RowTransport,
        batch: Batch,
        layout: SequenceLayout,
        ready: torch.cuda.Event | None,
        mark: int,
    ) -> None:
        self._roller, self._transport, self._layout, self._mark = roller, transport, layout, mark
        self._tensors = [batch[name] for name in transport.spec.names]
        self._rolled: list[Tokens] = []
        self._pending: PendingExchange | None = None
        self._backward: Backward | None = None
        if mark & EXPECTS_GRADIENTS:
            self._backward = Backward(transport, roller.compare, roller.backward_stopwatch)
            self._backward.watch(self._tensors)
            given = self._tensors
            self._tensors = list(_Start.apply(self._backward, *given))  # type: ignore[no-untyped-call]
            _run_late(self._tensors[0].grad_fn, given)
        if roller.is_overlapped:
            self._start_exchange(ready)

    def at(self, depth: int) -> Tokens:
        self._roller.check_depth(depth)
        if not self._rolled:
            self._roller.check_open()
            if self._transport.failure:
                raise RuntimeError(self._transport.failure)
            if self._pending is None:
                self._start_exchange()
            names = self._transport.spec.names
            flat = self._join() if self._backward is None else self._join_differentiably(self._backward)
            depths = [flat[at : at + len(names)] for at in range(0, len(flat), len(names))]
            self._rolled = [dict(zip(names, rolls, strict=True)) for rolls in depths]
            self._tensors = []
        return dict(self._rolled[depth - 1])

    def _join_differentiably(self, backward: Backward) -> tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():  # later `at` return the same rolls
            with torch.enable_grad():
                return self._join_differentiably(backward)
        flat: tuple[torch.Tensor, ...] = _Join.apply(self._join, backward, *self._tensors)  # type: ignore[no-untyped-call]
        return flat

    def _start_exchange(self, ready: torch.cuda.Event | None = None) -> None:
        self._roller.compare(self._layout, self._mark + JOINED)
        detached = [tensor.detach() for tensor in self._tensors]
        if ready is not None and not all(map(is_plain, detached)):
            torch.cuda.current_stream().wait_event(ready)  # what is sent is a copy, made on this stream
            ready = None
        detached = [plain(tensor) for tensor in detached]
        self._pending = self._transport.start(detached, self._layout, self._mark, ready)
        if self._backward is not None:
            self._backward.exchange = self._pending.buffers
        self._transport.raise_if_failed()

    def _join(self) -> tuple[torch.Tensor, ...]:
        assert self._pending is not None
        depths = self._pending.wait()
        self._transport.raise_if_failed()
        return tuple(depth[name] for depth in depths for name in self._transport.spec.names)


class Backward:
    """The backward of one exchange: it begins with the gradients of the rolls and ends at the tensors.

    A rank whose loss does not use the rolls still has to take part, because its peers wait for it. It notices when the
    gradient of one of its tensors is complete, and sends zeros then.
    """

    def __init__(
        self,
        transport: RowTransport,
        compare: Callable[[SequenceLayout, int], None],
        stopwatch: AbstractContextManager[None],
    ) -> None:
        """`compare`: as Roller.compare, before anything is exchanged."""
        self._transport, self._compare, self._stopwatch = transport, compare, stopwatch
        self.exchange: RowExchange | None = None  # None until it is started
        self._ended_in = NO_PASS  # the last pass of autograd in which it ended
        self._watched: list[int] = []  # the tensors that have a gradient
        self._late: dict[int, torch.Tensor] = {}  # by tensor: gradients of peers that have not been added

    def begin(self, gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """As RowTransport.begin_backward."""
        assert self.exchange is not None
        self._compare(self.exchange.layout, self.exchange.mark + BACKWARD)
        with self._stopwatch:
            sums = self._transport.begin_backward(self.exchange, gradients)
        self._transport.raise_if_failed()
        return sums

    def end(self) -> list[torch.Tensor]:
        """As RowTransport.end_backward."""
        assert self.exchange is not None
        with self._stopwatch:
            sums = self._transport.end_backward(self.exchange)
        self._transport.raise_if_failed()
        self._ended_in = _current_pass()
        self._late = {}  # of a pass that failed
        return sums

    def watch(self, tensors: list[torch.Tensor]) -> None:
        """Take part in the peers' backward when the gradient of one of the tensors is complete, if not before."""
        for number, tensor in enumerate(tensors):
            if tensor.requires_grad:
                self._watched.append(number)
                # A hook on a leaf lives as long as the tensor, which may be a parameter.
                this = weakref.ref(self) if tensor.is_leaf else lambda: self
                handle = tensor.register_hook(partial(_take_part, this, number))  # type: ignore[no-untyped-call]
                _run_first(tensor, handle.id)
                if tensor.is_leaf:
                    weakref.finalize(self, handle.remove).atexit = False

    def take_part(self, number: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of a tensor with what peers add to it; None if there is nothing to add.

        `gradient` is None if the tensor is one of several results of a function, and no loss of this rank uses it.
        """
        if self.exchange is None:
            return None
        if self._ended_in != _current_pass():
            depth = self._transport.spec.zeros(self.exchange.layout.local_len)
            self.begin([depth] * self._transport.plan.num_depths)
            sums = self.end()
            self._late = {one: sums[one] for one in self._watched}
            torch.autograd.Variable._execution_engine.queue_callback(self._check_late)
        if gradient is None:  # a hook must return None, too: `_check_late` says what is lost
            return None
        late = self._late.pop(number, None)
        if late is None:
            return None
        self._transport.wait_for_sums(self.exchange, [late])  # the hook of another tensor may have ended it
        return gradient + late

    def _check_late(self) -> None:
        """At the end of a pass: raise RuntimeError if a gradient of peers belongs to a tensor without one here."""
        late, self._late = self._late, {}
        if late:
            assert self.exchange is not None
            self._transport.wait_for_sums(self.exchange, list(late.values()))
        lost = [self._transport.spec.names[one] for one, gradient in late.items() if gradient.any()]
        if lost:
            raise RuntimeError(
                f"overlap_mtp: peers sent gradients of {', '.join(lost)}, but the loss of cp rank "
                f"{self._transport.plan.cp_rank} uses neither this nor the rolls, or this pass does not ask for its "
                "gradient: let the loss use all tensors that were given to `start`, or the rolls (times 0, if they do "
                "not count)"
            )


def _current_pass() -> int:
    """The number of the backward pass that this thread is in. DDP, FSDP and checkpoint use it, too."""
    return torch._C._current_graph_task_id()


def _take_part(
    backward: Callable[[], Backward | None], number: int, gradient: torch.Tensor | None
) -> torch.Tensor | None:
    one = backward()
    return None if one is None else one.take_part(number, gradient)


def _run_first(tensor: torch.Tensor, number: int) -> None:
    """Let a hook run before those that were registered earlier: they must see what peers add, as they do elsewhere."""
    hooks: dict[int, Any] = tensor._backward_hooks  # type: ignore[assignment]
    hooks.update({one: hooks.pop(one) for one in [*hooks] if one != number})


def _run_late(node: Any, tensors: list[torch.Tensor]) -> None:
    """Let a node of the graph run just before the nodes that the tensors come from, or last if they are leaves.

    Otherwise it would run before the backward of all that came between a tensor's birth and `start`. That hides its
    exchange, too. And a rank whose loss does not use the rolls takes part after that (`Backward.watch`). If that has
    collectives, and the others waited before it, all would hang.
    """
    born = [tensor.grad_fn._sequence_nr() for tensor in tensors if tensor.grad_fn is not None]
    node._set_sequence_nr(max(born, default=0))


class _Start(torch.autograd.Function):
    """The identity. Its backward waits for the gradients of peers and adds them."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange_backward = backward
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # What comes are the sums that `_Join.backward` returned: nothing else uses the tensors between the two.
        sums = ctx.exchange_backward.end()
        wanted = zip(sums, ctx.needs_input_grad[1:], strict=True)
        return None, *(one if is_wanted else None for one, is_wanted in wanted)


class _Join(torch.autograd.Function):
    """The rolls of all depths. Its backward sends the gradients of the rows that came from peers."""

    @staticmethod
    def forward(
        ctx: Any, join: Callable[[], tuple[torch.Tensor, ...]], backward: Backward, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange_backward, ctx.num_tensors = backward, len(tensors)
        return join()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        size = ctx.num_tensors
        depths = [list(gradients[at : at + size]) for at in range(0, len(gradients), size)]
        return (
            None,
            None,
            *ctx.exchange_backward.begin([[plain(one) for one in depth] for depth in depths]),
        )
