"""Activations between GPUs by NCCL. An overlapped exchange is packed and sent on the side stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import write_metadata
from overlap_mtp.exchange.row_transport import RowExchange, RowTransport, Tensors
from overlap_mtp.exchange.rows import Message, Round, RowMaps, RowPlan
from overlap_mtp.exchange.transport import PendingExchange, Rolled, TransportConfig
from overlap_mtp.kernels import rows
from overlap_mtp.kernels.row_maps import RowMapper
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tracing import span

_kept: list[torch.Tensor] = []  # error flags of transports that nobody closed: a kernel may still write them


class NcclRowTransport(RowTransport):
    """Neither direction waits on the host.

    `all_to_all_single` sends a round: grouped sends and receives. `sync` sends each message by itself, as peers do. If
    the plans of two ranks differ, a kernel finds it on the device, and `raise_if_failed` may raise a step later. If a
    peer never comes, NCCL's watchdog ends the process after the group's timeout.

    The buffer of an overlapped exchange belongs to the side stream. The compute stream uses it after the event in
    `RowExchange.posted`. Rolls and sums belong to the compute stream, but their own rows are written on the side stream
    (those of rolls only without `ready`, which may come before their memory is free). These copies of whole tensors
    take longer than all else, and no peer is needed for them. What comes from peers is written at the join. Behind the
    receive on the side stream it could hold up other work until a late peer comes: with one hardware queue, kernels run
    in the order in which they were launched.
    """

    name = "process_group"
    kernels = rows

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config, plans, tp_group)
        self._side = self.group.side_stream(self.device)
        self._writes_ahead = self.is_overlapped
        self._send_span = span("send-recv", num_bytes=self._message_bytes)
        self._mapper = RowMapper.of(self.rows, self.device)
        self._maps_of = lru_cache(maxsize=8)(self._make_maps)
        _kept.append(self.error_flags)
        self._headers = [self._find_headers(self._fixed_rounds, is_backward) for is_backward in (False, True)]
        if self.has_peers and self._fixed_rounds:
            # NCCL connects two ranks when they first exchange, which blocks the host: better now than later.
            buffer = torch.zeros(self.rows.num_rows, 1, device=self.device)
            with self.group.named_errors("connecting to its neighbours"):
                self._exchange(buffer, self._fixed_rounds[0])
                torch.cuda.current_stream(self.device).synchronize()

    def _make_maps(self, layout: SequenceLayout) -> RowMaps:
        """The maps of a batch, made on the device, on the current stream."""
        words = torch.zeros(self.plan.metadata_len, dtype=torch.int64, pin_memory=True)
        checksum = write_metadata(layout, self.plan, words.numpy())
        metadata = words.to(self.device, non_blocking=True)
        return self._mapper(metadata, layout.local_len // self.rows.tp_size, checksum)

    def finish(self, exchange: PendingExchange) -> Rolled:
        rows, current = exchange.buffers, torch.cuda.current_stream(self.device)
        if rows.stream is not None and rows.stream != current:  # all of it belongs to other streams
            current.wait_event(rows.arrived)  # another one may have waited
            for tensor in (rows.buffer, rows.maps.packed, *_own_tensors(rows)):
                tensor.record_stream(current)
        return super().finish(exchange)

    def take_back(self, exchange: PendingExchange) -> None:
        rows: RowExchange = exchange.buffers
        for tensor in _own_tensors(rows):
            tensor.record_stream(self._side)  # it may still use them
        rows.depths = []
        exchange.buffers = None

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        _kept[:] = [flags for flags in _kept if flags is not self.error_flags]
        self.raise_if_failed()

    @contextmanager
    def _aside(
        self, exchange: RowExchange, uses: Tensors, ready: torch.cuda.Event | None = None
    ) -> Iterator[None]:
        if not self.is_overlapped:
            yield
            return
        compute = torch.cuda.current_stream(self.device)
        self._side.wait_event(ready or compute.record_event())
        torch.cuda.set_stream(self._side)
        try:
            yield
        except BaseException:
            uses = [*uses, *_own_tensors(exchange)]  # nobody will join it
            raise
        finally:
            torch.cuda.set_stream(compute)
            for tensor in uses:
                tensor.record_stream(self._side)
        for tensor in (exchange.buffer, exchange.maps.packed):  # all maps are parts of one tensor
            tensor.record_stream(compute)
        exchange.posted = self._side.record_event()
        if not exchange.is_backward:
            exchange.stream, exchange.arrived = compute, exchange.posted

    def _leave(self, exchange: RowExchange) -> None:
        rounds = self._rounds(exchange)
        what = self._describe(exchange)
        with self._send_span, self.group.named_errors(what):
            for one in rounds:
                if self._has_headers:
                    self._exchange(exchange.buffer, one)
                else:
                    self._send_and_wait(exchange.buffer, one)
                self._count(exchange.buffer, one)

    def _arrive(self, exchange: RowExchange) -> None:
        if exchange.posted is not None:
            torch.cuda.current_stream(self.device).wait_event(exchange.posted)
            exchange.posted = None

    def _exchange(self, buffer: torch.Tensor, one: Round) -> None:
        received, recv_rows = self._part(buffer, one.received)
        sent, send_rows = self._part(buffer, one.sent)
        dist.all_to_all_single(received, sent, recv_rows, send_rows, group=self.group.process_group)

    def _part(self, buffer: torch.Tensor, messages: list[Message]) -> tuple[torch.Tensor, list[int]]:
        """(the rows of some messages, which lie one after the other; how many there are for each peer)."""
        rows = [0] * self.plan.cp_size
        for message in messages:
            rows[message.peer] = message.rows
        begin = messages[0].begin if messages else 0
        return buffer[begin : begin + sum(rows)], rows

    def _send_and_wait(self, buffer: torch.Tensor, one: Round) -> None:
        group = self.group.process_group
        calls = [
            dist.P2POp(call, message.of(buffer), self.group.global_rank(message.peer), group)
            for call, messages in ((dist.isend, one.sent), (dist.irecv, one.received))
            for message in messages
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()

    def _find_headers(self, rounds: list[Round], is_backward: bool) -> dict[str, Any]:
        """Where the headers of peers arrive, for the kernels that check them."""
        first = 0 if is_backward else self.rows.in_rows.start
        messages = [m for one in rounds for m in (one.sent if is_backward else one.received)]
        rows, peers = [m.begin - first for m in messages], [m.peer for m in messages]
        tables = torch.tensor([rows, peers], dtype=torch.int32, device=self.device)
        return {"header_rows": tables[0], "header_peers": tables[1], "error_flags": self.error_flags}

    def _checks(self, exchange: RowExchange, is_backward: bool) -> dict[str, Any]:
        if not self._has_headers:
            return {}
        fingerprint = self._fingerprint(exchange, is_backward)
        return {**self._headers[is_backward], "fingerprint": fingerprint}


def _own_tensors(exchange: RowExchange) -> list[torch.Tensor]:
    """The tensors of an exchange that is not joined, and its rolls, if they exist."""
    return [one for tensors in (exchange.tensors, *exchange.depths) for one in tensors]
