"""Tokens between CPU ranks: gloo, and the kernels in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.outputs import allocate_outputs
from overlap_mtp.exchange.plan import make_metadata
from overlap_mtp.exchange.transport import PendingExchange, Rolled, Transport
from overlap_mtp.kernels import reference
from overlap_mtp.layout import SequenceLayout


@dataclass(frozen=True)
class GlooBuffers:
    """What one exchange reads and receives."""

    tensors: list[torch.Tensor]
    metadata: torch.Tensor
    recv_buffer: torch.Tensor
    work: dist.Work | None


class GlooTransport(Transport):
    """`all_to_all_single` over gloo, which sends in a thread of its own. Waiting blocks the host.

    If the plans of two ranks differ, waiting sets an error flag. If a peer never comes, gloo gives up after the group's
    timeout, and waiting raises.
    """

    name = "process_group"

    @torch.inference_mode(False)
    def start(
        self,
        tensors: list[torch.Tensor],
        layout: Layout,
        mark: int,
        ready: torch.cuda.Event | None = None,
    ) -> PendingExchange:
        plan, words = self.plan, self.spec.words_per_token
        assert isinstance(layout, SequenceLayout)  # a roller reads a DeviceLayout on the CPU
        metadata = torch.from_numpy(make_metadata(layout, plan, mark))
        send_buffer, recv_buffer = (
            torch.empty(rows, words, dtype=torch.int64, device=self.device)
            for rows in (plan.num_send_rows, plan.num_recv_rows)
        )
        (outputs,) = allocate_outputs(self.spec, tensors, plan.num_depths)
        work = None
        if self.has_peers:
            reference.pack(self.spec.columns(tensors), metadata, plan, send_buffer)
            with self.group.named_errors(self.describe(self.num_started)):
                work = dist.all_to_all_single(
                    recv_buffer,
                    send_buffer,
                    list(plan.recv_rows),
                    list(plan.send_rows),
                    group=self.group.process_group,
                    async_op=True,
                )
            self.traffic.add(len(plan.destinations), self._message_bytes)
        buffers = GlooBuffers(tensors, metadata, recv_buffer, work)
        exchange = PendingExchange(self, self.num_started, layout.local_len, outputs.depths, buffers)
        self.num_started += 1
        return exchange

    def finish(self, exchange: PendingExchange) -> Rolled:
        buffers, spec = exchange.buffers, self.spec
        if buffers.work is not None:
            with self.group.named_errors(self.describe(exchange.number)):
                buffers.work.wait()
        outputs = [
            [spec.columns([rolled[name]]) for rolled in exchange.depths if name in rolled]
            for name in spec.names
        ]
        reference.unroll(
            spec.columns(buffers.tensors),
            [list(column) for rolls in outputs for column in zip(*rolls, strict=True)],
            spec.fill_bits,
            buffers.metadata,
            self.plan,
            buffers.recv_buffer,
            self.error_flags,
        )
        exchange.buffers = None
        return exchange.depths

    def take_back(self, exchange: PendingExchange) -> None:
        """Do nothing: gloo holds the buffers until the message is sent."""
