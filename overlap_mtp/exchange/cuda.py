"""What the transports between GPUs share: slots in a ring, streams and their events, capture in CUDA graphs."""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import abstractmethod
from collections import deque

import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape
from overlap_mtp.exchange.spec import Cargo, Outputs
from overlap_mtp.exchange.transport import Flight, Slot, Traffic, Transport
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.unroll import unroll_grid
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tensors import upload
from overlap_mtp.tracing import span

RING = 8  # slots that are made at a time: an exchange that is captured in a graph keeps one
AHEAD = 8  # microbatches whose rolls are allocated at a time, unless they are large:
AHEAD_BYTES = 8 << 20

_log = logging.getLogger("overlap_mtp")


class DeviceSlot(Slot):
    """A slot with its memory on the GPU, and the launches that are bound to it."""

    send: torch.Tensor  # the wires, where the transport has any
    recv: torch.Tensor
    send_kernel: Launch  # pack, or put
    unroll_kernel: Launch  # unroll, or take
    retired: tuple[Launch, ...] = ()
    shared: object = None  # what keeps the peers' memory mapped
    captured = False  # a CUDA graph reads it for as long as that lives

    def __init__(self, shape: PlanShape, cargo: Cargo) -> None:
        super().__init__(shape, cargo)
        self.record = torch.zeros_like(self.given, device=cargo.device)
        self.override = torch.full_like(self.record, -1)
        self.forked, self.sent, self.landed = (torch.cuda.Event() for _ in range(3))  # type: ignore[no-untyped-call]

    def unbind(self) -> None:
        """Lets go what may not go during a capture: a dropped flight of a closed transport keeps its slot."""
        del self.send_kernel, self.unroll_kernel
        self.retired, self.shared = (), None


class DeviceTransport(Transport):
    """Launches on the group's side stream (`overlapped`) or on the current one, and unrolls on the current one.

    Nothing here waits on the host. A slot is used again when its `landed` event has passed, which is asked and not
    waited for: a host that runs ahead of the device takes the next one. Slots live until `close`. An exchange that is
    captured in a CUDA graph keeps its slot for good, and is started and joined in the same capture.
    """

    def __init__(
        self,
        group: ExchangeGroup,
        shape: PlanShape,
        cargo: Cargo,
        traffic: Traffic,
        overlapped: bool,
        length: int,
    ) -> None:
        """`length`: tokens a rank of the first batch, for which launches are made ready."""
        super().__init__(group, shape, cargo, traffic)
        self._overlapped, self._length = overlapped, length
        self._index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        self._side = group.side_stream(self.device)
        self._compute = torch.cuda.current_stream(self.device)
        # What Triton asks too: 0.2 µs where torch.cuda.current_stream takes 3 (measured on the host of an H200).
        self._current_handle = torch._C._cuda_getCurrentRawStream
        self._is_capturing = torch.cuda.is_current_stream_capturing
        self._free: list[DeviceSlot] = []  # in the order in which they landed
        self._are_short = False
        self._has_captures = False
        self._slots: list[DeviceSlot] = []
        self._abandoned: deque[DeviceSlot] = deque()
        self._ready: list[Outputs] = []
        self._ready_for: tuple[int, torch.cuda.Stream] | None = None
        self._pack_span, self._send_span = span("pack"), span("send-recv", num_bytes=self._message_bytes)
        self._join_span, self._unroll_span = span("join"), span("unroll")
        self._closer = weakref.finalize(self, _leave, self._slots)
        self._closer.atexit = False

    @abstractmethod
    def _bind(self, slot: DeviceSlot, overridable: bool) -> None:
        """Gives a slot its launches; with `overridable` they heed `DeviceSlot.override`."""

    @abstractmethod
    def _send(self, flight: Flight, stream: int) -> None:
        """Launches pack and send/recv on the current stream, whose handle is `stream`."""

    @abstractmethod
    def _count(self, layout: SequenceLayout) -> None:
        """Adds an exchange to `traffic`."""

    def launch(
        self, tensors: list[torch.Tensor], layout: SequenceLayout, ready: torch.cuda.Event | None = None
    ) -> Flight:
        compute, side, capturing = self._current_stream(), self._side, self._is_capturing()
        length = tensors[0].shape[-1]
        outputs = self._outputs(tensors, length, compute, capturing)
        slot = self._take_slot_for_capture() if capturing else self._take_slot()
        slot.write(tensors, layout, outputs)
        flight = Flight(self, self.launched, slot, length, outputs.depths, compute)
        self.launched += 1
        slot.forked.record(compute)
        try:
            if self._overlapped:
                # A replay counts on the device what is sent, as this does: neither may overtake the other.
                side.wait_event(ready if ready and (capturing or not self._has_captures) else slot.forked)
                torch.cuda.set_stream(side)  # half the host time of `with torch.cuda.stream(side)`
                try:
                    if capturing and not self._is_capturing():
                        raise RuntimeError(
                            "`ready` must be recorded in the capture that the exchange is part of"
                        )
                    self._send(flight, side.cuda_stream)
                finally:
                    torch.cuda.set_stream(compute)
                slot.sent.record(side)
                if self._has_captures and not capturing:
                    compute.wait_event(slot.sent)
            else:
                self._send(flight, compute.cuda_stream)
        except Exception:
            flight.landed = True
            self._let_side_finish(slot)
            self._give_back(slot, side if self._overlapped else compute)
            raise
        if self.has_peers:
            self._count(layout)
        return flight

    def land(self, flight: Flight) -> list[dict[str, torch.Tensor]]:
        compute, slot, capturing = self._current_stream(), flight.slot, self._is_capturing()
        if capturing is not slot.captured:
            raise RuntimeError(
                f"exchange {flight.number} must be joined (`at`) where it was started, both in the same capture of a "
                "CUDA graph or both outside"
            )
        if flight.stream is not compute:
            # What its memory was used for before is ordered on that stream only.
            compute.wait_event(slot.forked)
            for tensor in [*slot.tensors, *(one for rolled in flight.depths for one in rolled.values())]:
                tensor.record_stream(compute)
        with self._join_span:
            if self._overlapped:
                compute.wait_event(slot.sent)
            with self._unroll_span:
                grid = unroll_grid(flight.length, self.shape, self.cargo)
                slot.unroll_kernel(compute.cuda_stream, grid, as_graph=not capturing)
        flight.landed = True
        self._give_back(slot, compute)
        return flight.depths

    def abandon(self, flight: Flight) -> None:
        if flight.slot.captured:
            _log.warning(
                "overlap_mtp: exchange %d was captured in a CUDA graph without its joins", flight.number
            )
        else:
            self._abandoned.append(flight.slot)

    def check(self) -> None:
        if self._abandoned and not self._is_capturing():
            self._recover_abandoned()
        super().check()

    def set_replay_layout(self, flight: Flight, layout: SequenceLayout) -> None:
        if not flight.slot.captured:
            super().set_replay_layout(flight, layout)
        if layout.local_len != flight.length:
            raise ValueError(
                f"a captured exchange keeps its length: it has {flight.length} tokens a rank, the new layout "
                f"{layout.local_len}"
            )
        flight.slot.override.copy_(upload(flight.slot.words_for(layout), self.device))

    def close(self) -> None:
        self._closer()
        free_left()
        self._free.clear()
        self._ready.clear()
        self._abandoned.clear()
        self.check()

    def _current_stream(self) -> torch.cuda.Stream:
        if self._current_handle(self._index) != self._compute.cuda_stream:
            self._compute = torch.cuda.current_stream(self.device)
        return self._compute

    def _outputs(
        self, tensors: list[torch.Tensor], length: int, stream: torch.cuda.Stream, capturing: bool
    ) -> Outputs:
        """Memory for the rolls that nothing else has used or will: a piece of what was allocated for several.

        Two allocations and eight views take 20 µs of host time, and 60 on cold caches (measured on the host of an
        H200): a third of an exchange.
        """
        if capturing:
            return self.cargo.outputs(tensors, self.shape.num_depths, length)[0]
        if not self._ready or self._ready_for != (length, stream):
            size = self.cargo.bytes_of_rolls(self.shape.num_depths, length)
            ahead = min(AHEAD, max(1, AHEAD_BYTES // size))
            self._ready = self.cargo.outputs(tensors, self.shape.num_depths, length, ahead)
            self._ready_for = (length, stream)
        return self._ready.pop()

    def _take_slot(self) -> DeviceSlot:
        if self._abandoned:
            self._recover_abandoned()
        if self._are_short:
            self._make_slots()
        free = self._free
        # One of the last that were used, where it has landed: what it needs is still in the host's caches.
        for index in (-1, -2, 0):
            if -len(free) <= index < len(free) and free[index].landed.query():  # type: ignore[no-untyped-call]
                return free.pop(index)
        self._make_slots()
        return free.pop(0)

    @torch.inference_mode(False)
    def _make_slots(self) -> None:
        self._are_short = False
        for _ in range(RING):
            # Their memory belongs to the stream that writes it first, which may not wait for the other.
            with torch.cuda.stream(self._side if self._overlapped else self._current_stream()):
                slot = DeviceSlot(self.shape, self.cargo)
                self._bind(slot, overridable=False)
            slot.send_kernel.prepare(slot.send_kernel.grid)
            slot.unroll_kernel.prepare(unroll_grid(self._length, self.shape, self.cargo))
            self._slots.append(slot)
            self._free.insert(0, slot)

    def _give_back(self, slot: DeviceSlot, stream: torch.cuda.Stream) -> None:
        """Says that the work on `stream` is the last on a slot, until another exchange takes it."""
        if not slot.captured:  # a graph keeps its slots
            slot.landed.record(stream)
            slot.forget()
            self._free.append(slot)

    def _let_side_finish(self, slot: DeviceSlot) -> None:
        """Nobody joins this exchange: its tensors' memory may be used again when the side stream has read them."""
        if self._overlapped:
            for tensor in slot.tensors:
                tensor.record_stream(self._side)

    def _recover_abandoned(self) -> None:
        while self._abandoned:
            self._recover(self._abandoned.popleft())

    def _recover(self, slot: DeviceSlot) -> None:
        """Makes a slot whose flight was dropped fit for another."""
        self._let_side_finish(slot)
        self._give_back(slot, self._side if self._overlapped else self._current_stream())

    def _take_slot_for_capture(self) -> DeviceSlot:
        """A slot for good. Memory cannot be pinned during a capture: the slot was made by a warm-up."""
        self._are_short = True  # the next exchange outside makes more
        if not self._free or self._abandoned:
            raise RuntimeError(
                f"no slot is left for an exchange to be captured (a roller makes {RING} at a time, and none during a "
                "capture), or one was dropped before it was joined: run the same exchange outside of a graph, then "
                "`roller.check()`, and capture again"
            )
        slot = self._free.pop(0)
        # No graph may go while another is being captured.
        slot.retired = (slot.send_kernel, slot.unroll_kernel)
        self._bind(slot, overridable=True)
        slot.captured = self._has_captures = True
        return slot


def _leave(slots: list[DeviceSlot]) -> None:
    """Leaves the slots of a transport that goes to whoever frees them next.

    The garbage collector calls this, in any thread and in the middle of a capture, which a wait would break, and a
    graph or symmetric memory that goes.
    """
    _left.extend(slots)
    slots.clear()


def free_left() -> None:
    """Frees slots that were left, once the device no longer uses them: it may still be reading their pinned memory.

    Waits, so for where no step is held up. Nothing may be captured in another thread.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    going: list[DeviceSlot] = []
    with contextlib.suppress(IndexError):  # another thread may take them too
        while True:
            going.append(_left.popleft())
    try:
        for device in {slot.record.device for slot in going}:
            torch.cuda.synchronize(device)
    except Exception:
        _left.extend(going)
        raise
    for slot in going:
        slot.unbind()


_left: deque[DeviceSlot] = deque()  # of transports that went
