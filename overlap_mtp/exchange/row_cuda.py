"""What the transports of activations between GPUs share: streams, events, and buffers that are used again."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import deque

import torch

from overlap_mtp.exchange.cuda import free_orphans, orphan
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_buffers import Fixed, Lease, RowBuffers
from overlap_mtp.exchange.row_transport import RowExchange, RowTransport, Tensors
from overlap_mtp.exchange.rows import RowPlan
from overlap_mtp.exchange.transport import PendingExchange, Rolled, TransportConfig
from overlap_mtp.kernels.row_maps import RowMapper
from overlap_mtp.kernels.rows import RowConstants
from overlap_mtp.tracing import span

BUFFERS = 2  # sets that are made at first: the host may be a step ahead


class CudaRowTransport(RowTransport):
    """Neither direction waits on the host, but for a second backward pass over a retained graph, and the first exchange
    with tp ranks.

    If the plans of two ranks differ, a kernel finds it on the device, and `raise_if_failed` may raise a step later.

    Rows travel in buffers that are used again, and kernels find the tensors' addresses there. So launches are replays
    of graphs. An exchange gives its buffers back when nothing refers to it any more; they are free after the event of
    their last use.

    Rolls and sums belong to the compute stream, but their own rows are written on the side stream (those of rolls only
    without `ready`, which may come before their memory is free). These copies of whole tensors take longer than all
    else, and no peer is needed for them. What comes from peers is written at the join. Behind the receive on the side
    stream it could hold up other work until a late peer comes: with one hardware queue, kernels run in the order in
    which they were launched.
    """

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config, plans, tp_group)
        self._side = self.group.side_stream(self.device)
        self._send_span = span("send-recv", num_bytes=self._message_bytes)
        self._fixed = Fixed(
            self.rows,
            self.spec,
            RowMapper.of(self.rows, self.device),
            RowConstants.of(self.spec),
            (self._find_headers(is_backward=False), self._find_headers(is_backward=True)),
            self.error_flags,
        )
        # 1 + the first tp rank with another plan, or 0.
        self._odd_tp_rank = torch.zeros((), dtype=torch.int32, device=self.device)
        self._all: list[RowBuffers] = []
        self._free: deque[RowBuffers] = deque()  # in the order in which they became free; new ones first
        weakref.finalize(self, orphan, self._all).atexit = False
        self._length = config.local_len // self.rows.tp_size

    @abstractmethod
    def _bind_sends(self, buffers: RowBuffers) -> None:
        """Bind what sends the rows to new buffers, whose graphs have not been captured."""

    def _make_first_buffers(self) -> None:
        for _ in range(BUFFERS):
            self._make_buffers(self._length, self.is_overlapped)

    def _take(self, length: int, writes_ahead: bool) -> RowBuffers:
        """Take the buffers that have been free for longest, or make some."""
        while self._free and self._free[0].length < length:
            orphan([self._discard()])
        if not self._free or not self._free[0].last_use.query():  # type: ignore[no-untyped-call]
            self._make_buffers(length, writes_ahead)
        return self._free.popleft()

    def _discard(self) -> RowBuffers:
        buffers = self._free.popleft()
        self._all.remove(buffers)
        return buffers

    @torch.inference_mode(False)
    def _make_buffers(self, length: int, writes_ahead: bool) -> None:
        part = 1 << max(0, length.bit_length() - 3)
        length = -(-length // part) * part  # batches that get longer and longer seldom need others
        # Their memory belongs to the stream that writes it first, which may not wait for the other.
        with torch.cuda.stream(self._side if self.is_overlapped else None):
            buffers = RowBuffers(self._fixed, length)
        self._bind_sends(buffers)
        buffers.capture(writes_ahead)
        self._all.append(buffers)
        self._free.appendleft(buffers)

    def _open(self, exchange: RowExchange, writes_ahead: bool) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("rolls of activations cannot be captured in a CUDA graph")
        length = exchange.layout.local_len // self.rows.tp_size
        stream = torch.cuda.current_stream(self.device)
        writes_ahead = writes_ahead and self.is_overlapped
        buffers = self._take(length, writes_ahead)
        exchange.held = Lease(buffers, self._free, writes_ahead, stream)
        exchange.maps, exchange.buffer = buffers.maps, buffers.rows
        addresses = [tensor.data_ptr() for tensor in _own_tensors(exchange)]
        buffers.host.write(exchange.layout, [length, *addresses], exchange.mark)

    def _open_backward(self, exchange: RowExchange) -> None:
        lease: Lease = exchange.held
        if lease.has_written:  # a second pass: the device may not have read yet what the first one wrote
            lease.buffers.last_use.synchronize()
        lease.has_written, exchange.buffer = True, lease.buffers.gradient_rows
        lease.backward_stream = torch.cuda.current_stream(self.device)
        self._wait_for_last_use(lease, lease.backward_stream)  # of a join that this backward does not follow
        addresses = [tensor.data_ptr() for tensor in _own_gradients(exchange)]
        lease.buffers.write_backward(addresses, self._fingerprint(exchange))

    def _pack(self, exchange: RowExchange) -> None:
        lease: Lease = exchange.held
        buffers = lease.buffers
        if lease.writes_ahead:
            # First the long copies: then the others run in the middle of the compute, not where a kernel begins.
            with self._unroll_span:
                buffers.maps_own.replay()
        with self._pack_span:
            if not lease.writes_ahead:
                buffers.maps_only.replay()
            if self.tp_group is not None:
                exchange.buffer.zero_()
            buffers.pack.replay()

    def _unroll(self, exchange: RowExchange) -> None:
        lease: Lease = exchange.held
        with self._unroll_span:
            (lease.buffers.unroll if lease.writes_ahead else lease.buffers.unroll_all).replay()
        self._note_use(lease)
        lease.joined()

    def _pack_gradients(self, exchange: RowExchange) -> None:
        buffers: RowBuffers = exchange.held.buffers
        with self._unroll_span:  # first, as in `_pack`
            buffers.sums.replay()
        with self._pack_span:
            if not self._has_headers:  # peers send back only what was sent
                exchange.buffer[: self.rows.sent.num_rows] = 0
            buffers.pack_sums.replay()

    def _add(self, exchange: RowExchange) -> None:
        lease: Lease = exchange.held
        with self._unroll_span:
            lease.buffers.add.replay()
        self._note_use(lease)
        if lease.backward_stream == torch.cuda.current_stream(self.device):
            lease.joined()
        else:  # the one that the gradients belong to has not waited
            lease.let_go()

    def wait_for_sums(self, exchange: RowExchange, sums: Tensors) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._wait_for_last_use(exchange.held, current):
            for one in sums:
                one.record_stream(current)

    def _note_use(self, lease: Lease) -> None:
        lease.used_on = torch.cuda.current_stream(self.device)
        lease.buffers.joined.record(lease.used_on)
        lease.buffers.last_use = lease.buffers.joined

    def _wait_for_last_use(self, lease: Lease, stream: torch.cuda.Stream) -> bool:
        """Let a stream wait for what another one did last, and say whether it was another one."""
        is_elsewhere = lease.used_on not in (None, stream)
        if is_elsewhere:
            stream.wait_event(lease.buffers.joined)
        return is_elsewhere

    def finish(self, exchange: PendingExchange) -> Rolled:
        rows, current = exchange.buffers, torch.cuda.current_stream(self.device)
        lease: Lease = rows.held
        is_elsewhere = lease.stream != current
        if is_elsewhere:  # all of it, and what used the memory before, belongs to other streams
            current.wait_event(lease.buffers.forked)
            for tensor in _own_tensors(rows):
                tensor.record_stream(current)
        if self.is_overlapped or is_elsewhere:
            current.wait_event(lease.buffers.last_use)  # of a backward, if one came before
            rows.posted = None
        return super().finish(exchange)

    def take_back(self, exchange: PendingExchange) -> None:
        exchange.buffers.held.let_go()
        super().take_back(exchange)

    def close(self) -> None:
        """Free the buffers. Those of exchanges whose backward is still to come follow when the transport is gone."""
        torch.cuda.synchronize(self.device)
        while self._free:
            orphan([self._discard()])
        free_orphans()
        super().close()

    def _begin(self, exchange: RowExchange, ready: torch.cuda.Event | None = None) -> None:
        lease: Lease = exchange.held
        buffers, compute = lease.buffers, lease.backward_stream or lease.stream
        buffers.forked.record(compute)
        if not self.is_overlapped:
            try:
                self._pack_and_send(exchange)
            finally:
                self._note_use(lease)
            return
        if exchange.is_backward:
            sent, tensors = buffers.returned, _own_gradients(exchange)
        else:
            sent, tensors = buffers.arrived, _own_tensors(exchange)
        lease.keep(tensors, self._side)
        self._side.wait_event(ready or buffers.forked)
        torch.cuda.set_stream(self._side)
        try:
            self._pack_and_send(exchange)
        finally:
            torch.cuda.set_stream(compute)
            sent.record(self._side)
            buffers.last_use = sent
        exchange.posted = sent

    def _arrive(self, exchange: RowExchange) -> None:
        if exchange.posted is not None:
            torch.cuda.current_stream(self.device).wait_event(exchange.posted)
            exchange.posted = None

    def _check_tp_ranks(self, exchange: RowExchange, words: torch.Tensor, own: int) -> None:
        others = words != own
        first = torch.where(others.any(), 1 + others.int().argmax(), 0).int()
        self._odd_tp_rank = torch.maximum(self._odd_tp_rank, first)  # stays until the host has seen it
        self.error_flags[-1].copy_(self._odd_tp_rank, non_blocking=True)
        if exchange.number == 0 and not exchange.is_backward:
            torch.cuda.current_stream(self.device).synchronize()
            self.raise_if_failed()

    def _find_headers(self, is_backward: bool) -> torch.Tensor:
        """Where the headers of peers arrive, as the kernels that check them take it."""
        first = 0 if is_backward else self.rows.in_rows.start
        messages = [m for one in self._fixed_rounds for m in (one.sent if is_backward else one.received)]
        rows, peers = [m.begin - first for m in messages], [m.peer for m in messages]
        return torch.tensor([rows, peers], dtype=torch.int32, device=self.device)


def _own_tensors(exchange: RowExchange) -> Tensors:
    """The tensors of an exchange that is not joined, and its rolls."""
    return [one for tensors in (exchange.tensors, *exchange.depths) for one in tensors]


def _own_gradients(exchange: RowExchange) -> Tensors:
    """The gradients of its rolls, and their sums."""
    return [one for tensors in (*exchange.gradients, exchange.sums) for one in tensors]
