"""What the schedules with a wire share (merged, overlap, prefetch): plans and transports."""

from __future__ import annotations

import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.select import Flight, Transport, open_transport, shapes_of
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.roller import Batch, Roller, Rolls

Tokens = dict[str, torch.Tensor]


class WiredRoller(Roller):
    """A roller whose exchanges carry all tensors and documents, and `depths_per_exchange` depths, at once."""

    overlapped: bool

    def __init__(self, group: ExchangeGroup, num_depths: int, max_documents: int, transport: str) -> None:
        super().__init__(group, num_depths, max_documents)
        self._wanted = transport
        self._transports: dict[object, Transport] = {}
        self._transport: Transport  # for the kind of batch that came last

    @property
    def transport(self) -> str:
        return self._transport.name if hasattr(self, "_transport") else self._wanted

    @property
    def depths_per_exchange(self) -> int:
        return 1

    def _admit(self, batch: Batch, layout: SequenceLayout) -> None:
        super()._admit(batch, layout)
        cargo = Cargo.of(batch)
        key = (cargo, layout.kind, None if layout.is_packed else layout.seq_len)
        if key not in self._transports:
            shapes = shapes_of(layout, self.depths_per_exchange, self.max_documents)
            with torch.inference_mode(False):  # what is allocated outlives the mode of the first use
                self._transports[key] = open_transport(
                    self._wanted,
                    self._group,
                    shapes,
                    cargo,
                    self.traffic,
                    self.overlapped,
                    layout.local_len,
                )
        self._transport = self._transports[key]

    def _start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None) -> Rolls:
        rolls = FlyingRolls(self, self._transport, batch, layout)
        if self.overlapped:
            rolls.launch(ready)
        return rolls

    def close(self) -> None:
        super().close()
        transports, self._transports = self._transports, {}
        errors: list[Exception] = []
        for transport in transports.values():
            try:
                transport.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def check(self) -> None:
        for transport in self._transports.values():
            transport.check()


class FlyingRolls(Rolls):
    """The rolls of exchanges: one for all depths, or one after the other, each of what the one before brought."""

    def __init__(
        self, roller: WiredRoller, transport: Transport, batch: Batch, layout: SequenceLayout
    ) -> None:
        self._roller = roller
        self._transport = transport
        self._layout = layout
        self._newest: Batch = dict(batch)  # what the next exchange rolls
        self._flights: list[Flight] = []
        self._rolled: list[Tokens] = []

    def at(self, depth: int) -> Tokens:
        self._roller.check_depth(depth)
        while len(self._rolled) < depth:
            self._roller.check_open()
            if not self._flights or self._flights[-1].landed:
                self.launch()
            self._land()
        return dict(self._rolled[depth - 1])

    def launch(self, ready: torch.cuda.Event | None = None) -> None:
        """Sends what the next exchange carries."""
        if ready is not None and not all(tensor.is_contiguous() for tensor in self._newest.values()):
            torch.cuda.current_stream().wait_event(ready)  # what is read now is a copy, made on this stream
            ready = None
        tensors = self._transport.cargo.tensors(self._newest)
        self._flights.append(self._transport.launch(tensors, self._layout, ready))
        self._transport.check()

    def _land(self) -> None:
        self._rolled += self._transport.land(self._flights[-1])
        self._newest = self._rolled[-1]
        self._transport.check()
        if self._roller.overlapped and len(self._rolled) < self._roller.num_depths:
            self.launch()  # travels while the MTP layer of this depth computes

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        before, now = (
            f"{'packed' if one.is_packed else 'dense'} {one.kind}, cp_size {one.cp_size}"
            for one in (self._layout, layout)
        )
        if before != now:
            raise ValueError(
                f"a captured exchange keeps its kind of layout: it has {before}, the new one is {now}"
            )
        for flight in self._flights:
            self._transport.set_replay_layout(flight, layout)
        self._transport.check()
