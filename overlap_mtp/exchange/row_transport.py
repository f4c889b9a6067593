"""What the transports of activations share: rows leave, arrive, and their gradients go back."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import fingerprint_of
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.rows import HEADER, Round, RowPlan, document_rounds, message_rounds, reversed_rounds
from overlap_mtp.exchange.transport import IN_STEP, PendingExchange, Rolled, Transport, TransportConfig
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tracing import span

# What is added to the mark of a microbatch: in forward if gradients will come back; in backward.
EXPECTS_GRADIENTS, BACKWARD = 32, 64
SUM_OVER_TP = "the sum of boundary rows over the tp ranks"
Tensors = list[torch.Tensor]


@dataclass(eq=False)
class RowExchange:
    """One exchange of activations, from its start to the end of its backward."""

    number: int
    order: int  # among the exchanges of activations of the group
    mark: int
    layout: SequenceLayout
    tensors: Tensors  # empty after the rolls were written
    depths: list[Tensors]  # the rolls, until the join
    gradients: list[Tensors] = field(default_factory=list)  # those of the rolls, while they may be read
    sums: Tensors = field(default_factory=list)  # of the gradients, from the begin of backward to its end
    maps: Any = field(init=False)  # RowMaps
    buffer: torch.Tensor = field(init=False)  # [rows of the plan, elements of a row], of what is under way
    is_backward: bool = False
    posted: Any = None  # what is under way, as the transport keeps it
    held: Any = None  # what else the transport keeps for it


class RowTransport(Transport):
    """Moves rows of activations between the ranks of a group, forward and backward. It knows no autograd."""

    carries = "activations"

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config)
        self.spec: RowSpec
        cp_rank = self.plan.cp_rank
        self.rows, self.tp_group = plans[cp_rank], tp_group
        self.schedule, self.is_overlapped = self.spec.schedule, config.is_overlapped
        self._flagged = range(self.plan.cp_size)
        self._fixed_rounds = message_rounds(self.rows) if self.schedule in ("merged", "overlap") else []
        self._has_headers = bool(self._fixed_rounds)
        self._pack_span, self._join_span, self._unroll_span = span("pack"), span("join"), span("unroll")
        self._document_rounds = lru_cache(maxsize=64)(
            partial(document_rounds, plans=plans, cp_rank=cp_rank, sizes=self.spec.sizes)
        )

    def start(
        self, tensors: Tensors, layout: Layout, mark: int, ready: torch.cuda.Event | None = None
    ) -> PendingExchange:
        if torch.is_inference_mode_enabled():  # the mode may end before the exchange does
            with torch.inference_mode(False):
                return self.start(tensors, layout, mark, ready)
        assert isinstance(layout, SequenceLayout)  # a roller reads a DeviceLayout
        depths = [self._empty_like(tensors) for _ in range(self.plan.num_depths)]
        exchange = RowExchange(self.num_started, self.group.num_exchanges, mark, layout, tensors, depths)
        self.num_started += 1
        self.group.num_exchanges += 1
        self._open(exchange, ready is None)
        self._begin(exchange, ready)
        return PendingExchange(self, exchange.number, layout.local_len, [], exchange)

    def finish(self, exchange: PendingExchange) -> Rolled:
        rows: RowExchange = exchange.buffers
        with self._join_span:
            self._arrive(rows)
            self._unroll(rows)
        depths, rows.depths, rows.tensors = rows.depths, [], []
        return [dict(zip(self.spec.names, depth, strict=True)) for depth in depths]

    def take_back(self, exchange: PendingExchange) -> None:
        exchange.buffers.depths = []
        exchange.buffers = None

    def begin_backward(self, exchange: RowExchange, gradients: list[Tensors]) -> Tensors:
        """Add up the gradients of the own rows, and send those of the rows that came from peers.

        Args:
            exchange: whose rolls have these gradients.
            gradients: for each depth, one for each tensor, of its shape.

        Returns:
            For each tensor the sum over the depths: to be read after `end_backward`, which adds what peers send.
        """
        self._arrive(exchange)  # if nobody has waited for it
        self.raise_if_failed()
        # As long as it is kept, autograd does not add other gradients to one in place.
        exchange.gradients, exchange.sums = gradients, self._empty_like(gradients[0])
        exchange.is_backward = True
        self._open_backward(exchange)
        self._begin(exchange)
        if not self.is_overlapped or torch.is_anomaly_enabled():  # autograd then looks for nan in the sums
            self._arrive(exchange)
            exchange.gradients = []
        return exchange.sums

    def end_backward(self, exchange: RowExchange) -> Tensors:
        """Wait for the gradients that peers send, and return the sums with them."""
        with self._join_span:
            self._arrive(exchange)
            self._add(exchange)
        sums, exchange.sums, exchange.gradients = exchange.sums, [], []
        return sums

    def wait_for_sums(self, exchange: RowExchange, sums: Tensors) -> None:
        """Let the current stream read sums that `end_backward` may have returned on another one."""

    @abstractmethod
    def _open(self, exchange: RowExchange, writes_ahead: bool) -> None:
        """Give an exchange its maps and its buffer.

        Args:
            exchange: that begins.
            writes_ahead: the rolls may be written before the join. What used their memory before may run after `ready`.
        """

    @abstractmethod
    def _open_backward(self, exchange: RowExchange) -> None:
        """Give an exchange a buffer for its backward."""

    @abstractmethod
    def _pack(self, exchange: RowExchange) -> None:
        """Pack the rows that leave. It may send them, too, if there are no tp ranks."""

    @abstractmethod
    def _unroll(self, exchange: RowExchange) -> None:
        """Write the rolls, from own rows and those that have arrived."""

    @abstractmethod
    def _pack_gradients(self, exchange: RowExchange) -> None:
        """Write the sums of the own rows' gradients, and pack those that leave, as `_pack` does."""

    @abstractmethod
    def _add(self, exchange: RowExchange) -> None:
        """Add the gradients that have arrived to the sums."""

    @abstractmethod
    def _begin(self, exchange: RowExchange, ready: torch.cuda.Event | None = None) -> None:
        """Pack and send: beside the compute that follows, if the exchange is overlapped.

        Args:
            exchange: whose rows.
            ready: as in `Roller.start`.
        """

    def _pack_and_send(self, exchange: RowExchange) -> None:
        (self._pack_gradients if exchange.is_backward else self._pack)(exchange)
        self._sum_over_tp(exchange)
        self._leave(exchange)

    @abstractmethod
    def _leave(self, exchange: RowExchange) -> None:
        """Send the packed rows."""

    @abstractmethod
    def _arrive(self, exchange: RowExchange) -> None:
        """Wait for the rows of peers, if they are under way."""

    def _count(self, buffer: torch.Tensor, one: Round) -> None:
        parts = [message.of(buffer) for message in one.sent]
        self.traffic.add(len(parts), sum(part.nbytes for part in parts))

    def _sum_over_tp(self, exchange: RowExchange) -> None:
        """Add up the rows that the tp ranks have packed, and write the headers again, which are no numbers.

        In rank order: the order of an all-reduce depends on where a row lies in its message, and so on the schedule.
        """
        if self.tp_group is None or self.schedule == "none":
            return
        with self.tp_group.named_errors(SUM_OVER_TP):
            words, own = self._words_of_tp(exchange, self.tp_group)
        self._check_tp_ranks(exchange, words, own)
        if exchange.is_backward:
            rows, index = exchange.buffer[self.rows.in_rows], exchange.maps.in_back[0]
        else:
            rows, index = exchange.buffer[self.rows.out_rows], exchange.maps.packed
        bits = rows.view(torch.int32)
        gathered = bits.new_empty((self.tp_group.cp_size, *bits.shape))
        with self.tp_group.named_errors(SUM_OVER_TP):
            dist.all_gather(list(gathered), bits, group=self.tp_group.process_group)
        if exchange.is_backward:
            first, *others = gathered.view(rows.dtype)
            total = first.to(torch.promote_types(rows.dtype, torch.float32))
            for one in others:
                total += one
            rows.copy_(total)
        else:  # all but one tp rank hold zeros
            bits.copy_(gathered.sum(0, dtype=torch.int32))
        rows.view(torch.int64)[:, 0].masked_fill_(index == HEADER, self._fingerprint(exchange))

    def _words_of_tp(self, exchange: RowExchange, tp_group: ExchangeGroup) -> tuple[torch.Tensor, int]:
        """A word of each tp rank, int64 [tp ranks], which says what it means to exchange; and this rank's."""
        mark = exchange.mark % 2**23  # without the roller's number among those of its cp group
        own = fingerprint_of(exchange.layout.checksum ^ self._kind, exchange.layout.batch, mark)
        words = torch.zeros(tp_group.cp_size, dtype=torch.int64, device=self.device)
        words[tp_group.cp_rank] = own
        dist.all_reduce(words, group=tp_group.process_group)
        return words, own

    @cached_property
    def _kind(self) -> int:
        """The checksum of the spec."""
        return zlib.crc32(repr(self.spec.describe()).encode())

    @abstractmethod
    def _check_tp_ranks(self, exchange: RowExchange, words: torch.Tensor, own: int) -> None:
        """Raise RuntimeError, or let `raise_if_failed` raise it later, if a tp rank has another word than this one.

        Before the first sum it raises: if tensors had other sizes, the sum would hang or end the process.
        """

    def _describe_odd_tp_rank(self, tp_rank: int) -> str:
        assert self.tp_group is not None
        return (
            f"overlap_mtp: tp rank {tp_rank} exchanged {self.carries} by another plan than tp rank "
            f"{self.tp_group.cp_rank}: {IN_STEP}"
        )

    def _describe_failure(self, source: int, late: list[int], last: int) -> str:
        """The last flag counts tp ranks here, because rollers of activations read bounds on the host."""
        return self._describe_odd_tp_rank(last - 1) if last else super()._describe_failure(source, late, 0)

    def _rounds(self, exchange: RowExchange) -> list[Round]:
        """What travels, in this order."""
        rounds = self._document_rounds(exchange.layout) if self.schedule == "sync" else self._fixed_rounds
        return reversed_rounds(rounds) if exchange.is_backward else rounds

    def _describe(self, exchange: RowExchange) -> str:
        """What is under way, for error messages."""
        described = self.describe(exchange.number)
        return (
            f"the backward (which every rank must run) of {described}" if exchange.is_backward else described
        )

    def _fingerprint(self, exchange: RowExchange) -> int:
        """What headers hold, in the direction that is under way."""
        mark = exchange.mark + BACKWARD * exchange.is_backward
        return fingerprint_of(exchange.layout.checksum, exchange.layout.batch, mark)

    def _empty_like(self, tensors: Tensors) -> Tensors:
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
