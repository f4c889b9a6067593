"""Activations between GPUs by NCCL."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_buffers import RowBuffers
from overlap_mtp.exchange.row_cuda import CudaRowTransport
from overlap_mtp.exchange.row_transport import RowExchange
from overlap_mtp.exchange.rows import Message, Round, RowPlan, reversed_rounds
from overlap_mtp.exchange.transport import TransportConfig


class Part(NamedTuple):
    """The messages of a round, as `all_to_all_single` takes them."""

    received: torch.Tensor
    sent: torch.Tensor
    recv_rows: list[int]  # from each peer
    send_rows: list[int]
    num_messages: int  # that are sent

    @classmethod
    def of(cls, buffer: torch.Tensor, one: Round, cp_size: int) -> Part:
        """The parts of a buffer that travel."""

        def part(messages: list[Message]) -> tuple[torch.Tensor, list[int]]:
            """(their rows, which lie one after the other; how many there are for each peer)."""
            rows = [0] * cp_size
            for message in messages:
                rows[message.peer] = message.rows
            begin = messages[0].begin if messages else 0
            return buffer[begin : begin + sum(rows)], rows

        (received, recv_rows), (sent, send_rows) = part(one.received), part(one.sent)
        return cls(received, sent, recv_rows, send_rows, len(one.sent))


class NcclRowTransport(CudaRowTransport):
    """`all_to_all_single` sends a round: grouped sends and receives. `sync` sends each message by itself, as peers do.

    If a peer never comes, NCCL's watchdog ends the process after the group's timeout.
    """

    name = "process_group"

    def __init__(self, config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None) -> None:
        super().__init__(config, plans, tp_group)
        self._make_first_buffers()
        if self.has_peers and self._fixed_rounds:
            # NCCL connects two ranks when they first exchange, which blocks the host: better now than later.
            with self.group.named_errors("connecting to its neighbours"):
                self._exchange(self._free[0].sends[0][0])
                torch.cuda.current_stream(self.device).synchronize()

    def _bind_sends(self, buffers: RowBuffers) -> None:
        directions = (
            (buffers.rows, self._fixed_rounds),
            (buffers.gradient_rows, reversed_rounds(self._fixed_rounds)),
        )
        buffers.sends = [
            [Part.of(buffer, one, self.plan.cp_size) for one in rounds] for buffer, rounds in directions
        ]

    def _leave(self, exchange: RowExchange) -> None:
        """As `named_errors` does, but what is under way is described only if it fails."""
        buffers: RowBuffers = exchange.held.buffers
        try:
            with self._send_span:
                for part in buffers.sends[exchange.is_backward]:
                    self._exchange(part)
                    self.traffic.add(part.num_messages, part.sent.nbytes)
                if self.schedule == "sync":
                    for one in self._rounds(exchange):
                        self._send_and_wait(exchange.buffer, one)
                        self._count(exchange.buffer, one)
        except RuntimeError as error:
            raise self.group.named(error, self._describe(exchange)) from error

    def _exchange(self, part: Part) -> None:
        group = self.group.process_group
        dist.all_to_all_single(part.received, part.sent, part.recv_rows, part.send_rows, group=group)

    def _send_and_wait(self, buffer: torch.Tensor, one: Round) -> None:
        group = self.group.process_group
        calls = [
            dist.P2POp(call, message.of(buffer), self.group.global_rank(message.peer), group)
            for call, messages in ((dist.isend, one.sent), (dist.irecv, one.received))
            for message in messages
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
