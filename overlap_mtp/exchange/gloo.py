"""Tokens between CPU ranks: gloo, and the kernels' plain torch reference."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.exchange.transport import Flight, Slot, Traffic, Transport
from overlap_mtp.kernels import reference
from overlap_mtp.layout import SequenceLayout


class HostTransport(Transport):
    """`all_to_all_single` over gloo, which sends in a thread of its own; `land` waits for it.

    A plan that differs between two ranks raises when its header lands, a peer that never comes when gloo gives up.
    """

    name = "process_group"

    def __init__(
        self, group: ExchangeGroup, shape: PlanShape, cargo: Cargo, traffic: Traffic, overlapped: bool
    ) -> None:
        super().__init__(group, shape, cargo, traffic)
        self._overlapped = overlapped
        self._free: list[HostSlot] = []

    def launch(
        self, tensors: list[torch.Tensor], layout: SequenceLayout, ready: torch.cuda.Event | None = None
    ) -> Flight:
        slot = self._free.pop() if self._free else self._new_slot()
        (outputs,) = self.cargo.outputs(tensors, self.shape.num_depths, layout.local_len)
        slot.write(tensors, layout, outputs)
        flight = Flight(self, self.launched, slot, layout.local_len, outputs.depths)
        self.launched += 1
        if self.has_peers:
            views = [self.cargo.integers(tensor) for tensor in tensors]
            reference.pack(views, slot.given, self.table, self.shape, slot.send)
            with self.group.named_errors(self.describe(flight)):
                flight.work = dist.all_to_all_single(
                    slot.recv,
                    slot.send,
                    list(self.shape.recv_rows),
                    list(self.shape.send_rows),
                    group=self.group.group,
                    async_op=True,
                )
            self.traffic.add(len(self.shape.destinations), self._message_bytes)
        return flight

    @torch.inference_mode(False)
    def _new_slot(self) -> HostSlot:
        return HostSlot(self.shape, self.cargo)

    def land(self, flight: Flight) -> list[dict[str, torch.Tensor]]:
        slot, integers = flight.slot, self.cargo.integers
        if flight.work is not None:
            with self.group.named_errors(self.describe(flight)):
                flight.work.wait()
        flight.landed = True
        depths = flight.depths
        reference.unroll(
            [integers(tensor) for tensor in slot.tensors],
            [[integers(rolled[name]) for rolled in depths] for name in self.cargo.names],
            self.cargo.fills,
            slot.given,
            self.table,
            self.shape,
            slot.recv,
            self.trouble,
        )
        self._free.append(slot)
        return depths

    def abandon(self, flight: Flight) -> None:
        """Its wires are gloo's until the message is through, which nobody waits for: let it go."""

    def close(self) -> None:
        self._free.clear()
        self.check()


class HostSlot(Slot):
    def __init__(self, shape: PlanShape, cargo: Cargo) -> None:
        super().__init__(shape, cargo)
        self.send = torch.zeros(shape.num_send_rows, cargo.words, dtype=torch.int64)
        self.recv = torch.zeros(shape.num_recv_rows, cargo.words, dtype=torch.int64)
