"""merged, batched, overlap and prefetch: all tensors and documents in one message, at four times.

- merged: one exchange for each depth, waited for where it is started;
- batched: one exchange for all depths, waited for at the first of them. It shows what is left to gain by overlapping
  alone, because its messages are those of prefetch;
- overlap: one exchange for each depth on the side stream. Depth k + 1 travels while MTP layer k computes. Values that
  are not known in advance, such as activations, need this order;
- prefetch: one exchange for all depths on the side stream, under the trunk. Every token that any depth needs is known
  when the batch arrives.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from overlap_mtp.device_layout import DeviceLayout, Layout
from overlap_mtp.exchange.plan import make_plans
from overlap_mtp.exchange.select import make_transport
from overlap_mtp.exchange.spec import Batch
from overlap_mtp.exchange.transport import PendingExchange, Transport, TransportConfig
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.roller import CHANGED, MARKS, REFUSED, Roller, RollerConfig, Rolls, Spec, Tokens

MAX_TRANSPORTS = 8  # of a roller, for different kinds of batch; those in CUDA graphs come on top
PACKED_SCHEDULES = ("merged", "batched", "overlap", "prefetch")
OVERLAPPED = ("overlap", "prefetch")  # on the side stream, started as early as possible
BY_DEPTH = ("merged", "overlap")  # an exchange for each depth; otherwise one carries them all


class PackedRoller(Roller):
    """A roller whose exchanges carry all tensors and documents at once."""

    reads_device_bounds = True

    def __init__(self, config: RollerConfig) -> None:
        super().__init__(config)
        self.is_overlapped = self.name in OVERLAPPED
        self._asked_transport = config.transport
        self._transports: dict[Spec, Transport] = {}
        self._transport: Transport | None = None  # for the spec of the last batch
        self._layout: Layout  # of the last batch
        self.refusal: PendingExchange | None = None  # in place of the last microbatch

    @property
    def transport(self) -> str:
        return self._transport.name if self._transport else self._asked_transport

    def _adopt(self, spec: Spec, layout: Layout) -> None:
        if spec in self._transports:
            self._transports[spec] = self._transports.pop(spec)  # the last one is the last used
        else:
            self._make_room()
            with torch.inference_mode(False):  # what is allocated outlives the mode of the first use
                self._transports[spec] = self._make_transport(spec, layout)
        self._transport = self._transports[spec]

    def _make_transport(self, spec: Any, layout: Layout) -> Transport:
        pattern = layout.pattern() if isinstance(layout, DeviceLayout) else layout
        depths = 1 if self.name in BY_DEPTH else self.num_depths
        plans = make_plans(pattern, depths, self.max_documents)
        return make_transport(
            TransportConfig(self._group, plans, spec, self.traffic, self.is_overlapped, layout.local_len)
        )

    def _make_room(self) -> None:
        """Retire the transports that were used least recently. All ranks do so for the same ones."""
        idle = [spec for spec, one in self._transports.items() if not one.has_captures]
        for spec in idle[: max(0, len(idle) + 1 - MAX_TRANSPORTS)]:
            self._transports.pop(spec).retire()

    def _start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None) -> Rolls:
        assert self._transport is not None
        self._layout = layout
        rolls = PackedRolls(self, self._transport, batch, layout)
        if self.is_overlapped:
            rolls.start_next(ready)
        return rolls

    def check_in_step(self) -> None:
        """Raise RuntimeError in place of an exchange if this rank knows that the ranks are out of step."""
        transport = self._transport
        assert transport is not None
        if self.refusal is not None and not transport.failure:
            refusal, self.refusal = self.refusal, None
            refusal.wait()
            with contextlib.suppress(RuntimeError):
                transport.raise_if_failed()
        if transport.failure:
            self._refuse()  # the peers have started, or will start, as many exchanges
            raise RuntimeError(transport.failure)

    def _refuse(self) -> None:
        if self.check_layouts:
            super()._refuse()
        elif not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            self.refusal = self._send_nothing(self.mark + REFUSED)
            self.mark += MARKS

    def _announce_change(self) -> None:
        if self.check_layouts:
            super()._announce_change()
            return
        self._send_nothing(self.mark + CHANGED).wait()
        if self._group.device_type == "cuda":
            torch.cuda.synchronize()
        for transport in self._transports.values():  # not for what this rank alone may know
            transport.raise_if_failed()

    def _send_nothing(self, mark: int) -> PendingExchange:
        """Start an exchange of zeros in place of one that the peers may have started."""
        transport, spec = self._transport, self._spec
        assert transport is not None
        assert spec is not None
        return transport.start(spec.zeros(self._layout.local_len), self._layout, mark)

    def close(self) -> None:
        super().close()
        self.refusal = None
        transports, self._transports = self._transports, {}
        errors: list[Exception] = []
        for transport in transports.values():
            try:
                transport.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def raise_if_failed(self) -> None:
        for transport in self._transports.values():
            transport.raise_if_failed()
            if transport.failure:  # replays of a graph would go on, without the tokens of peers that are late
                raise RuntimeError(transport.failure)


class PackedRolls(Rolls):
    """The rolls of one exchange, or of several: each rolls the result of the one before."""

    def __init__(self, roller: PackedRoller, transport: Transport, batch: Batch, layout: Layout) -> None:
        self._roller = roller
        self._transport = transport
        self._layout = layout
        self._mark = roller.mark  # of the first exchange; the others count up from it
        self._newest: Batch = dict(batch)  # what the next exchange rolls
        self._exchanges: list[PendingExchange] = []
        self._rolled: list[Tokens] = []
        self._has_failed = False

    def at(self, depth: int) -> Tokens:
        self._roller.check_depth(depth)
        if self._has_failed and self._transport.failure and depth <= len(self._rolled):
            raise RuntimeError(self._transport.failure)
        while len(self._rolled) < depth:
            self._roller.check_open()
            if not self._exchanges or self._exchanges[-1].is_done:
                self.start_next()
            elif self._transport.failure:
                raise RuntimeError(self._transport.failure)
            self._wait()
        return self._roller.at_depth(self._rolled[depth - 1], depth)

    def start_next(self, ready: torch.cuda.Event | None = None) -> None:
        """Start the next exchange."""
        if self._roller.refusal is not None or self._transport.failure:
            self._roller.check_in_step()
        tensors = [self._newest[name] for name in self._transport.spec.names]
        if not all(map(torch.Tensor.is_contiguous, tensors)):
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready)  # what is sent is a copy, made on this stream
                ready = None
            tensors = [tensor.contiguous() for tensor in tensors]
        mark = self._mark + len(self._rolled) % CHANGED
        self._exchanges.append(self._transport.start(tensors, self._layout, mark, ready))
        self._transport.raise_if_failed()

    def _wait(self) -> None:
        self._rolled += self._exchanges[-1].wait()
        self._newest, self._has_failed = self._rolled[-1], True
        self._transport.raise_if_failed()
        if self._roller.is_overlapped and len(self._rolled) < self._roller.num_depths:
            self.start_next()  # travels while the MTP layer of this depth computes
        self._has_failed = False

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        if isinstance(layout, DeviceLayout):
            raise ValueError(
                "set_replay_layout needs a SequenceLayout, got a DeviceLayout: pass layout.on_host()"
            )
        before, now = (
            f"{'packed' if one.is_packed else 'dense'} {one.kind}, cp_size {one.cp_size}"
            for one in (self._layout, layout)
        )
        if before != now:
            raise ValueError(
                f"a captured exchange keeps its kind of layout: it has {before}, the new one is {now}"
            )
        for exchange in self._exchanges:
            self._transport.set_replay_layout(exchange, layout)
        self._roller.raise_if_failed()
