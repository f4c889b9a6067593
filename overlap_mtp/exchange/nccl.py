"""Tokens between GPUs by NCCL: one `all_to_all_single` over the exchange group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp.exchange.cuda import CudaTransport, ExchangeBuffers
from overlap_mtp.exchange.transport import TransportConfig
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.pack import pack
from overlap_mtp.kernels.unroll import unroll


class NcclTransport(CudaTransport):
    """One message for each peer by `all_to_all_single` with split sizes: grouped sends and receives, no empty ones.

    With `async_op=False` NCCL runs it on the current stream: the side stream if it is overlapped. If the plans of two
    ranks differ, the unroll finds it on the device: `raise_if_failed` may raise a step later. If a peer never
    comes, NCCL's watchdog ends the process after the group's timeout and names the exchange group.
    """

    name = "process_group"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._make_buffers()
        if self.has_peers:
            # NCCL connects two ranks when they first exchange, which blocks the host: better now than later.
            with self.group.named_errors("connecting to its neighbours"):
                self._exchange(self._free[0])
                torch.cuda.current_stream(self.device).synchronize()

    def _send(self, buffers: ExchangeBuffers, number: int) -> None:
        with self._pack_span:
            self._launch(buffers.send, buffers)
        if self.has_peers:
            try:
                with self._send_span:
                    self._exchange(buffers)
            except RuntimeError as error:
                raise self.group.named(error, self.describe(number)) from error

    def _exchange(self, buffers: ExchangeBuffers) -> None:
        dist.all_to_all_single(
            buffers.recv_buffer,
            buffers.send_buffer,
            list(self.plan.recv_rows),
            list(self.plan.send_rows),
            group=self.group.process_group,
        )

    def _bind(self, buffers: ExchangeBuffers, first: Launch | None) -> None:
        if not hasattr(buffers, "send_buffer"):  # a capture binds buffers again
            buffers.send_buffer, buffers.recv_buffer = (
                torch.zeros(rows, self.spec.words_per_token, dtype=torch.int64, device=self.device)
                for rows in (self.plan.num_send_rows, self.plan.num_recv_rows)
            )
        metadata, replay_metadata = buffers.metadata, buffers.replay_metadata
        packed = (buffers.source, replay_metadata, metadata, *self._tables, buffers.send_buffer)
        buffers.send = pack(packed, buffers.constants)
        buffers.send.first = first
        unrolled = (metadata, replay_metadata, *self._tables, buffers.recv_buffer, self.error_flags)
        buffers.unroll = unroll(unrolled, buffers.constants)
