"""Tokens between GPUs by NCCL: one `all_to_all_single` over the exchange group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp.exchange.cuda import DeviceSlot, DeviceTransport
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.exchange.transport import Flight, Traffic
from overlap_mtp.kernels.pack import pack
from overlap_mtp.kernels.unroll import unroll
from overlap_mtp.layout import SequenceLayout


class ProcessGroupTransport(DeviceTransport):
    """One message a peer by `all_to_all_single` with split sizes: grouped sends and receives that skip empty ones.

    With `async_op=False` it runs on the current stream, which is the side stream here. A plan that differs between
    two ranks is found when its header lands, without a synchronisation: `check` may raise a step later. A peer that
    never comes ends in NCCL's watchdog after the group's timeout, which names the exchange group.
    """

    name = "process_group"

    def __init__(
        self,
        group: ExchangeGroup,
        shape: PlanShape,
        cargo: Cargo,
        traffic: Traffic,
        overlapped: bool,
        length: int,
    ) -> None:
        super().__init__(group, shape, cargo, traffic, overlapped, length)
        self._send_rows, self._recv_rows = list(shape.send_rows), list(shape.recv_rows)
        self._options = dist.AllToAllOptions()
        self._options.asyncOp = False
        self._make_slots()
        if self.has_peers:
            self._group = group.group
            self._connect()

    def _send(self, flight: Flight, stream: int) -> None:
        slot = flight.slot
        with self._pack_span:
            slot.send_kernel(stream, as_graph=not slot.captured)
        if self.has_peers:
            try:
                with self._send_span:
                    self._exchange(slot)
            except RuntimeError as error:
                raise self.group.named(error, self.describe(flight)) from error

    def _count(self, layout: SequenceLayout) -> None:
        self.traffic.add(len(self.shape.destinations), self._message_bytes)

    def _exchange(self, slot: DeviceSlot) -> None:
        """`dist.all_to_all_single(async_op=False)` without its wrapper, a sixth of its host time."""
        self._group.alltoall_base(slot.recv, slot.send, self._recv_rows, self._send_rows, self._options)

    def _connect(self) -> None:
        """NCCL connects two ranks when they first exchange, which blocks the host: better now than later."""
        with self.group.named_errors("connecting to its neighbours"):
            self._exchange(self._slots[0])
            torch.cuda.current_stream(self.device).synchronize()

    def _bind(self, slot: DeviceSlot, overridable: bool) -> None:
        shape, cargo = self.shape, self.cargo
        if not overridable:
            rows = (shape.num_send_rows, shape.num_recv_rows)
            slot.send, slot.recv = (
                torch.zeros(n, cargo.words, dtype=torch.int64, device=self.device) for n in rows
            )
        slot.send_kernel = pack(
            (slot.given, slot.override, slot.record, self.table, self.cargo_table, slot.send),
            shape,
            cargo,
            overridable,
        )
        buffers = (slot.record, slot.override, self.table, self.cargo_table, slot.recv, self.trouble)
        slot.unroll_kernel = unroll(buffers, shape, cargo, overridable)
