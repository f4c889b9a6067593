"""Tokens between GPUs of one host by their own stores: symmetric memory, and two kernels an exchange.

`put` packs into the peers' memory and raises a flag there, `take` waits for the flags, unrolls and acknowledges.
All counting is done on the device, so that an exchange can be captured in a CUDA graph and replayed:

- an exchange's epoch is the number of the put, 1 for the first; its tokens go to slot epoch % SLOTS of the peer;
- the flag of a slot and a source holds the epoch that was last put there: there is nothing to reset;
- a slot is written again when the peer has acknowledged the epoch before, whichever way tokens travel between the
  two; a flight that is dropped is acknowledged as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from overlap_mtp.exchange.cuda import DeviceSlot, DeviceTransport
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.exchange.transport import WORD_BYTES, Flight, Traffic, num_units
from overlap_mtp.kernels.put_pack import put
from overlap_mtp.kernels.signals import WORDS as FLAG_WORDS
from overlap_mtp.kernels.wait_unroll import discard, take
from overlap_mtp.layout import SequenceLayout

SLOTS = 64  # exchanges that may be under way at a time
DEFAULT_PATIENCE = timedelta(minutes=10)  # as NCCL's


@dataclass(frozen=True)
class SymmetricLayout:
    """Where things are in a rank's symmetric memory, in int64 words; alike on all ranks."""

    cp_size: int
    slot_words: int
    slots: int

    @classmethod
    def of(cls, shapes: list[PlanShape], words: int, slots: int = SLOTS) -> SymmetricLayout:
        """For ranks with these shapes, in rank order, and rows of so many words."""
        rows = max(shape.num_recv_rows for shape in shapes)
        return cls(len(shapes), -(-rows * words // FLAG_WORDS) * FLAG_WORDS, slots)

    @property
    def signals_at(self) -> int:
        return self.slots * self.slot_words

    @property
    def acknowledgements_at(self) -> int:
        return self.signals_at + self.slots * self.cp_size * FLAG_WORDS

    @property
    def num_words(self) -> int:
        return self.acknowledgements_at + self.slots * self.cp_size * FLAG_WORDS

    def constants(self, timed: bool) -> dict[str, object]:
        """What `put` and `take` have to know; `timed`: patience is in ns, else in turns of the waiting loop."""
        return {
            "RING": self.slots,
            "SLOT_WORDS": self.slot_words,
            "SIGNALS_AT": self.signals_at,
            "ACKNOWLEDGEMENTS_AT": self.acknowledgements_at,
            "TIMED": timed,
        }


def peer_tables(shapes: list[PlanShape], cp_rank: int, addresses: list[int]) -> tuple[list[int], list[int]]:
    """The rows of `peers` (for put) and of `sources` (for take), one after the other.

    `addresses`: where each rank's memory is, as this rank sees it.
    """
    shape = shapes[cp_rank]
    peers = [
        word
        for peer in shape.destinations
        for word in (
            addresses[peer],
            peer,
            shapes[peer].first_recv_row(cp_rank),
            shape.first_send_row(peer),
            shape.send_stride[peer],
        )
    ]
    return peers, [word for peer in shape.sources for word in (addresses[peer], peer)]


class SymmetricTransport(DeviceTransport):
    """Two kernels an exchange and no library call. Needs GPUs that can write to each other's memory.

    A peer that never comes ends the wait after the exchange group's timeout, and `check` then raises.
    """

    name = "symmetric"

    def __init__(
        self,
        group: ExchangeGroup,
        shapes: list[PlanShape],
        cargo: Cargo,
        traffic: Traffic,
        overlapped: bool,
        length: int,
        memory: torch.Tensor,
    ) -> None:
        """Collective over the cp group. `shapes`: of all ranks; `memory`: from `allocate`, which all of them have.

        Raises where it cannot be shared.
        """
        shape = shapes[group.cp_rank]
        super().__init__(group, shape, cargo, traffic, overlapped, length)
        self._places = SymmetricLayout.of(shapes, cargo.words)
        self._memory = memory
        addresses, self._mapping = share_memory(memory, group)
        peers, sources = peer_tables(shapes, group.cp_rank, addresses)
        self._peers, self._sources = (
            torch.tensor(one or [0], dtype=torch.int64, device=self.device) for one in (peers, sources)
        )
        self._epochs = torch.zeros(len(shape.destinations) + 1, dtype=torch.int64, device=self.device)
        patience = (group.timeout or DEFAULT_PATIENCE) / timedelta(microseconds=1) * 1000
        self._patience = torch.tensor([int(patience)], dtype=torch.int64, device=self.device)
        self._under_way: dict[int, None] = {}  # numbers of flights, oldest first
        self._make_slots()

    def launch(
        self, tensors: list[torch.Tensor], layout: SequenceLayout, ready: torch.cuda.Event | None = None
    ) -> Flight:
        oldest = min(list(self._under_way), default=self.launched)
        if oldest <= self.launched - SLOTS:
            raise RuntimeError(
                f"exchange {oldest} must be joined (`at`) or dropped before exchange {self.launched} can start: at "
                f"most {SLOTS} in a row may be under way over symmetric memory"
            )
        flight = super().launch(tensors, layout, ready)
        self._under_way[flight.number] = None
        return flight

    def land(self, flight: Flight) -> list[dict[str, torch.Tensor]]:
        rolled = super().land(flight)
        self._under_way.pop(flight.number, None)
        return rolled

    def abandon(self, flight: Flight) -> None:
        self._under_way.pop(flight.number, None)
        super().abandon(flight)

    def close(self) -> None:
        try:
            super().close()
        finally:
            del self._memory, self._mapping  # here and now; a capture may be under way when the roller goes

    def _send(self, flight: Flight, stream: int) -> None:
        with self._send_span:
            flight.slot.send_kernel(stream, as_graph=not flight.slot.captured)

    def _count(self, layout: SequenceLayout) -> None:
        units = num_units(self.shape, layout)
        rows = sum(1 + units * self.shape.send_stride[peer] for peer in self.shape.destinations)
        self.traffic.add(len(self.shape.destinations), WORD_BYTES * self.cargo.words * rows)

    def _recover(self, slot: DeviceSlot) -> None:
        stream = self._side if self._overlapped else self._current_stream()
        places = self._places
        with torch.cuda.stream(stream):
            discard(slot.record, self._sources, self.shape, places.slots, places.acknowledgements_at)(
                stream.cuda_stream
            )
        super()._recover(slot)

    def _bind(self, slot: DeviceSlot, overridable: bool) -> None:
        slot.shared = self._mapping
        constants = self._places.constants(timed=True)
        given = (slot.given, slot.override, slot.record, self.table, self.cargo_table)
        shared = (self._memory, self._epochs, self.trouble, self._patience)
        slot.send_kernel = put((*given, self._peers, *shared), self.shape, self.cargo, constants, overridable)
        taken = (slot.record, slot.override, self.table, self.cargo_table, self._sources, self._memory)
        slot.unroll_kernel = take(
            (*taken, self.trouble, self._patience), self.shape, self.cargo, constants, overridable
        )


def allocate(shapes: list[PlanShape], cargo: Cargo) -> torch.Tensor:
    """Zeroed int64 memory for exchanges of `cargo` between ranks of these shapes, which can be shared."""
    import torch.distributed._symmetric_memory as symmetric_memory

    size = SymmetricLayout.of(shapes, cargo.words).num_words
    memory = symmetric_memory.empty(size, dtype=torch.int64, device=cargo.device)
    memory.zero_()
    torch.cuda.synchronize(cargo.device)
    return memory


def share_memory(memory: torch.Tensor, group: ExchangeGroup) -> tuple[list[int], Any]:
    """(where each rank's memory is, as this rank sees it; what keeps these mapped). Collective."""
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, group.group)
    offset = getattr(handle, "offset", 0)
    return [address + offset for address in handle.buffer_ptrs], handle
