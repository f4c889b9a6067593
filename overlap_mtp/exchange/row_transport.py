"""What the transports of activations share: rows leave, arrive, and their gradients go back."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import fingerprint_of
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.rows import HEADER, Round, RowMaps, RowPlan, document_rounds, message_rounds
from overlap_mtp.exchange.transport import PendingExchange, Rolled, Transport, TransportConfig
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tracing import span

# What is added to the mark of a microbatch: in forward if gradients will come back; in backward.
EXPECTS_GRADIENTS, BACKWARD = 32, 64
Tensors = list[torch.Tensor]


@dataclass(eq=False)
class RowExchange:
    """One exchange of activations, from its start to the end of its backward."""

    number: int
    order: int  # among the exchanges of activations of the group
    mark: int
    layout: SequenceLayout
    tensors: Tensors  # empty after the rolls were written
    depths: list[Tensors] = field(default_factory=list)  # the rolls, after their own rows, until the join
    gradients: list[Tensors] = field(default_factory=list)  # those of the rolls, while they may be read
    maps: RowMaps = field(init=False)
    buffer: torch.Tensor = field(init=False)  # [rows of the plan, elements of a row], of what is under way
    received: torch.Tensor = field(init=False)  # its `in` rows in forward
    is_backward: bool = False
    posted: Any = None  # what is under way, as the transport keeps it
    stream: Any = None  # the CUDA stream that it was started from, if it was sent on another one
    arrived: Any = None  # then, the event after which its rows are here in forward


class RowTransport(Transport):
    """Moves rows of activations between the ranks of a group, forward and backward. It knows no autograd."""

    carries = "activations"
    kernels: Any  # overlap_mtp.kernels.row_reference, or a module with the same functions
    _writes_ahead = False  # own rows of rolls are written at the start, unless it has a `ready`

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config)
        self.spec: RowSpec
        cp_rank = self.plan.cp_rank
        self.rows, self.tp_group = plans[cp_rank], tp_group
        self.schedule, self.is_overlapped = self.spec.schedule, config.is_overlapped
        self._flagged = range(self.plan.cp_size)
        self._fixed_rounds = message_rounds(self.rows) if self.schedule in ("merged", "overlap") else []
        self._has_headers = bool(self._fixed_rounds)
        self._buffer_shape = self.rows.num_rows, self.spec.elements
        self._pack_span, self._join_span, self._unroll_span = span("pack"), span("join"), span("unroll")
        self._maps_of = lru_cache(maxsize=8)(partial(RowMaps.of, plan=self.rows))
        self._document_rounds = lru_cache(maxsize=64)(
            partial(document_rounds, plans=plans, cp_rank=cp_rank, sizes=self.spec.sizes)
        )

    @torch.inference_mode(False)
    def start(
        self, tensors: Tensors, layout: Layout, mark: int, ready: torch.cuda.Event | None = None
    ) -> PendingExchange:
        assert isinstance(layout, SequenceLayout)  # a roller reads a DeviceLayout
        exchange = RowExchange(self.num_started, self.group.num_exchanges, mark, layout, tensors)
        self.num_started += 1
        self.group.num_exchanges += 1
        # Of a sum over tp ranks, each rank writes its own rows only; with `none`, nobody writes those of peers.
        allocate = torch.zeros if self.tp_group is not None or self.schedule == "none" else torch.empty
        # What used the memory of the rolls before may run after `ready`.
        writes_ahead = self._writes_ahead and ready is None
        if writes_ahead:
            exchange.depths = self._allocate_depths(tensors)
        with self._aside(exchange, [], ready):
            with self._pack_span:
                exchange.maps = self._maps_of(layout)
                # First the long copies: then the others run in the middle of the compute, not where a kernel begins.
                if writes_ahead:
                    self._unroll_own(exchange, exchange.depths)
                exchange.buffer = allocate(self._buffer_shape, dtype=self.spec.dtype, device=self.device)
                exchange.received = exchange.buffer[self.rows.in_rows]
                rows, fingerprint = exchange.buffer[self.rows.out_rows], self._fingerprint(exchange)
                self.kernels.pack_rows(self._by_sequence(tensors), exchange.maps.packed, rows, fingerprint)
            # The other tp ranks hold zeros, so that a sum of bits is exact.
            self._sum_over_tp(exchange, rows, rows.view(torch.int32))
            self._leave(exchange)
        return PendingExchange(self, exchange.number, layout.local_len, [], exchange)

    def finish(self, exchange: PendingExchange) -> Rolled:
        rows: RowExchange = exchange.buffers
        with self._join_span:
            self._arrive(rows)
            if not rows.depths:
                depths = self._allocate_depths(rows.tensors)
                self._unroll_own(rows, depths)
                rows.depths = depths
            with self._unroll_span:
                by_sequence = [self._by_sequence(depth) for depth in rows.depths]
                checks = self._checks(rows, is_backward=False)
                self.kernels.unroll_received_rows(rows.received, rows.maps.in_back, by_sequence, **checks)
        depths, rows.depths, rows.tensors = rows.depths, [], []
        return [dict(zip(self.spec.names, depth, strict=True)) for depth in depths]

    def begin_backward(self, exchange: RowExchange, gradients: list[Tensors]) -> Tensors:
        """Add up the gradients of the own rows, and send those of the rows that came from peers.

        Args:
            exchange: whose rolls have these gradients.
            gradients: for each depth, one for each tensor, of its shape.

        Returns:
            For each tensor the sum over the depths, without what peers send: to be read after `end_backward`.
        """
        self._arrive(exchange)  # if nobody has waited for it
        self.raise_if_failed()
        exchange.is_backward = True
        if self.is_overlapped:  # autograd adds other gradients to one in place if nobody else has it
            exchange.gradients = gradients
        by_depth = [self._by_sequence(depth) for depth in gradients]
        sums = self._empty_like(gradients[0])
        with self._aside(exchange, [*sums, *(one for depth in gradients for one in depth)]):
            with self._unroll_span:  # first, as in `start`
                self.kernels.sum_rows(by_depth, exchange.maps.own_back, self._by_sequence(sums))
            with self._pack_span:
                if exchange.tensors:  # the rolls may yet be written, from what arrived
                    exchange.buffer = torch.zeros_like(exchange.buffer)
                if not self._has_headers:  # peers send back only what was sent
                    exchange.buffer[: self.rows.sent.num_rows] = 0
                rows, fingerprint = exchange.buffer[self.rows.in_rows], self._fingerprint(exchange)
                self.kernels.pack_sums(by_depth, exchange.maps.in_back, rows, fingerprint)
            self._sum_over_tp(exchange, rows, rows)
            self._leave(exchange)
        if not self.is_overlapped or torch.is_anomaly_enabled():  # autograd then looks for nan in the sums
            self._arrive(exchange)
        return sums

    def end_backward(self, exchange: RowExchange, sums: Tensors) -> None:
        """Wait for the gradients that peers send, and add them to `sums`, in place."""
        rows, maps, by_sequence = exchange.buffer[self.rows.out_rows], exchange.maps, self._by_sequence(sums)
        with self._join_span:
            self._arrive(exchange)
            exchange.gradients = []
            with self._unroll_span:
                self.kernels.add_rows(
                    rows, maps.returned_to, maps.returned, by_sequence, **self._checks(exchange, True)
                )

    def retire(self) -> None:
        """Do nothing: buffers belong to their exchange."""

    def _allocate_depths(self, tensors: Tensors) -> list[Tensors]:
        return [self._empty_like(tensors) for _ in range(self.plan.num_depths)]

    def _unroll_own(self, exchange: RowExchange, depths: list[Tensors]) -> None:
        """Write the own rows of the rolls."""
        with self._unroll_span:
            by_sequence = [self._by_sequence(depth) for depth in depths]
            self.kernels.unroll_own_rows(
                self._by_sequence(exchange.tensors), exchange.maps.source, by_sequence
            )

    @abstractmethod
    def _aside(
        self, exchange: RowExchange, uses: Tensors, ready: torch.cuda.Event | None = None
    ) -> AbstractContextManager[None]:
        """Where rows are packed and sent: beside the compute that follows, if the exchange is overlapped.

        Args:
            exchange: whose rows.
            uses: what is read or written there and may be freed before the rows arrive.
            ready: as in `Roller.start`.
        """

    @abstractmethod
    def _leave(self, exchange: RowExchange) -> None:
        """Send the packed rows."""

    @abstractmethod
    def _arrive(self, exchange: RowExchange) -> None:
        """Wait for the rows of peers, if they are under way."""

    def _checks(self, exchange: RowExchange, is_backward: bool) -> dict[str, Any]:
        """What a kernel needs to check headers, if the transport does not do it before.

        Rolls may be written after a backward pass, from what arrived before it.
        """
        return {}

    def _count(self, buffer: torch.Tensor, one: Round) -> None:
        parts = [message.of(buffer) for message in one.sent]
        self.traffic.add(len(parts), sum(part.nbytes for part in parts))

    def _sum_over_tp(self, exchange: RowExchange, rows: torch.Tensor, summed_as: torch.Tensor) -> None:
        """Add up the rows that the tp ranks have packed, and write the headers again, which are no numbers.

        Args:
            exchange: whose rows.
            rows: the part of its buffer.
            summed_as: the same memory, in the dtype of the sum.
        """
        if self.tp_group is None or self.schedule == "none":
            return
        with self.tp_group.named_errors("the sum of boundary rows over the tp ranks"):
            dist.all_reduce(summed_as, group=self.tp_group.process_group)
        index = exchange.maps.in_back[0] if exchange.is_backward else exchange.maps.packed
        rows.view(torch.int64)[:, 0].masked_fill_(index == HEADER, self._fingerprint(exchange))

    def _rounds(self, exchange: RowExchange) -> list[Round]:
        """What travels, in this order. In backward the last depth comes first."""
        rounds = self._document_rounds(exchange.layout) if self.schedule == "sync" else self._fixed_rounds
        return [one.reversed() for one in reversed(rounds)] if exchange.is_backward else rounds

    def _describe(self, exchange: RowExchange) -> str:
        """What is under way, for error messages."""
        described = self.describe(exchange.number)
        return (
            f"the backward of {described}, which every rank must run," if exchange.is_backward else described
        )

    def _fingerprint(self, exchange: RowExchange, is_backward: bool | None = None) -> int:
        """What headers hold; by default, of the direction that is under way."""
        mark = exchange.mark + BACKWARD * (exchange.is_backward if is_backward is None else is_backward)
        return fingerprint_of(exchange.maps.checksum, exchange.layout.batch, mark)

    def _by_sequence(self, tensors: Tensors) -> Tensors:
        """Views whose first dimension is the sequence."""
        return [tensor.transpose(self.spec.seq_dim, 0) for tensor in tensors]

    def _empty_like(self, tensors: Tensors) -> Tensors:
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
