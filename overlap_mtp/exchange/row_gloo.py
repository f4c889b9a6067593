"""Activations between CPU ranks: gloo, and the kernels in plain torch."""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_transport import RowExchange, RowTransport, Tensors
from overlap_mtp.exchange.rows import Round, RowMaps, RowPlan
from overlap_mtp.exchange.transport import TransportConfig
from overlap_mtp.kernels import row_reference


@dataclass(frozen=True, eq=False)
class Posted:
    """A round under way. gloo writes into the buffer whenever a message arrives, so it must live until then."""

    rounds: list[Round]  # the one under way, then those that follow it
    works: list[dist.Work | None]  # of what it receives, then of what it sends
    what: str  # for error messages
    buffer: torch.Tensor
    owner: weakref.ref[RowExchange]


class GlooRowTransport(RowTransport):
    """Sends and receives over gloo, one for each peer: so a peer that never comes is named. Waiting blocks the host."""

    name = "process_group"

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config, plans, tp_group)
        self._maps_of = lru_cache(maxsize=8)(partial(RowMaps.of, plan=self.rows))
        # Of a sum over tp ranks, each rank writes its own rows only; with `none`, nobody writes those of peers.
        self._allocate = torch.zeros if tp_group is not None or self.schedule == "none" else torch.empty

    def _open(self, exchange: RowExchange, writes_ahead: bool) -> None:
        exchange.maps = self._maps_of(exchange.layout)
        exchange.buffer = self._allocate(
            (self.rows.num_rows, self.spec.elements), dtype=self.spec.dtype, device=self.device
        )
        exchange.held = exchange.buffer[self.rows.in_rows]  # what is received in forward

    def _open_backward(self, exchange: RowExchange) -> None:
        if exchange.tensors:  # the rolls may yet be written, from what arrived
            exchange.buffer = torch.zeros_like(exchange.buffer)
        if not self._has_headers:  # peers send back only what was sent
            exchange.buffer[: self.rows.sent.num_rows] = 0

    def _pack(self, exchange: RowExchange) -> None:
        with self._pack_span:
            rows, fingerprint = exchange.buffer[self.rows.out_rows], self._fingerprint(exchange)
            row_reference.pack_rows(
                self._by_sequence(exchange.tensors), exchange.maps.packed, rows, fingerprint
            )

    def _unroll(self, exchange: RowExchange) -> None:
        with self._unroll_span:
            rolls, maps = [self._by_sequence(depth) for depth in exchange.depths], exchange.maps
            row_reference.unroll_own_rows(self._by_sequence(exchange.tensors), maps.source, rolls)
            row_reference.unroll_received_rows(exchange.held, maps.in_back, rolls)

    def _pack_gradients(self, exchange: RowExchange) -> None:
        by_depth, maps = [self._by_sequence(depth) for depth in exchange.gradients], exchange.maps
        with self._unroll_span:
            row_reference.sum_rows(by_depth, maps.own_back, self._by_sequence(exchange.sums))
        with self._pack_span:
            rows, fingerprint = exchange.buffer[self.rows.in_rows], self._fingerprint(exchange)
            row_reference.pack_sums(by_depth, maps.in_back, rows, fingerprint)

    def _add(self, exchange: RowExchange) -> None:
        rows, maps = exchange.buffer[self.rows.out_rows], exchange.maps
        with self._unroll_span:
            row_reference.add_rows(rows, maps.returned_to, maps.returned, self._by_sequence(exchange.sums))

    def _begin(self, exchange: RowExchange, ready: torch.cuda.Event | None = None) -> None:
        """gloo sends in threads of its own. But first, what nobody waits for any more has to arrive."""
        if not self.failure:  # peers that are in step have sent it
            for posted in [one for one in self.group.unfinished if one.owner() is None]:
                self._wait(posted)
        self._pack_and_send(exchange)

    def _leave(self, exchange: RowExchange) -> None:
        """Post the first round. The others follow when it has arrived."""
        self._post(exchange, self._rounds(exchange))

    def _arrive(self, exchange: RowExchange) -> None:
        while exchange.posted is not None:
            posted: Posted = exchange.posted
            self._wait(posted)
            exchange.posted = None
            if self._is_wrong(exchange, posted.rounds[0]):
                self._refuse_rest(exchange, posted.rounds[1:])
                return
            self._post(exchange, posted.rounds[1:])

    def _refuse_rest(self, exchange: RowExchange, rest: list[Round]) -> None:
        """Send what peers will wait for, with headers of no exchange: so those that are no neighbours hear of it."""
        self._post_refusals(exchange, rest)
        if not exchange.is_backward:
            exchange.is_backward = True
            self._post_refusals(exchange, self._rounds(exchange))

    def _post_refusals(self, exchange: RowExchange, rounds: list[Round]) -> None:
        for one in rounds:
            for message in one.sent:
                exchange.buffer[message.begin].view(torch.int64)[0] = 0
            self._post(exchange, [one])

    def _post(self, exchange: RowExchange, rounds: list[Round]) -> None:
        if not rounds:
            return
        what = self._describe(exchange)
        rank_of, group = self.group.global_rank, self.group.process_group
        with self.group.named_errors(what):
            received, sent = (
                [
                    call(part, rank_of(message.peer), group, self._tag(exchange, part))
                    for message, part in ((message, message.of(exchange.buffer)) for message in messages)
                ]
                for call, messages in ((dist.irecv, rounds[0].received), (dist.isend, rounds[0].sent))
            )
        self._count(exchange.buffer, rounds[0])
        owner = weakref.ref(exchange)
        exchange.posted = Posted(rounds, received + sent, what, exchange.buffer, owner)
        self.group.unfinished.append(exchange.posted)

    def _tag(self, exchange: RowExchange, part: torch.Tensor) -> int:
        """The tag of a message, 31 bits. Messages meet if their tags are equal.

        A header tells what a message is for. So the messages of a peer that is out of step are received, unless they
        have another length, which would end the process. Without headers they must not be received.
        """
        if self._has_headers:
            return exchange.order % 2**20 << 11 | part.nbytes % 1021 << 1 | exchange.is_backward
        return zlib.crc32(self._fingerprint(exchange).to_bytes(8)) % 2**31

    def _wait(self, posted: Posted) -> None:
        messages = posted.rounds[0].received + posted.rounds[0].sent
        for work, message in zip(posted.works, messages, strict=True):
            assert work is not None
            with self.group.named_errors(f"{posted.what}, in which it waited for cp rank {message.peer},"):
                work.wait()
        self.group.unfinished.remove(posted)

    def _check_tp_ranks(self, exchange: RowExchange, words: torch.Tensor, own: int) -> None:
        others = (words != own).nonzero().flatten().tolist()
        if others:
            self.failure = self._describe_odd_tp_rank(others[0])
            raise RuntimeError(self.failure)

    def _is_wrong(self, exchange: RowExchange, one: Round) -> bool:
        """Set the error flag if a message of a round was not meant for this exchange."""
        if not self._has_headers:
            return False
        fingerprint = self._fingerprint(exchange)
        for message in one.received:
            if int(exchange.buffer[message.begin].view(torch.int64)[0]) != fingerprint:
                self.error_flags[0] = 1 + message.peer
                return True
        return False

    def _by_sequence(self, tensors: Tensors) -> Tensors:
        """Views whose first dimension is the sequence."""
        return [tensor.transpose(self.spec.seq_dim, 0) for tensor in tensors]
