"""What the transports between GPUs share: buffers, streams and their events, captures in CUDA graphs."""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import abstractmethod
from collections import deque
from typing import Any

import torch

from overlap_mtp.device_layout import DeviceLayout, Layout
from overlap_mtp.exchange.outputs import OutputPool, Outputs, allocate_outputs
from overlap_mtp.exchange.plan import (
    FINGERPRINT,
    ExchangePlan,
    fingerprint_of,
    write_metadata,
    write_references,
)
from overlap_mtp.exchange.spec import ExchangeSpec, column_addresses
from overlap_mtp.exchange.transport import PendingExchange, Rolled, Transport, TransportConfig
from overlap_mtp.kernels.bounds import write_bounds
from overlap_mtp.kernels.common import ExchangeConstants
from overlap_mtp.kernels.launch import Launch
from overlap_mtp.kernels.unroll import unroll_grid
from overlap_mtp.layout import IntArray, SequenceLayout
from overlap_mtp.tensors import upload
from overlap_mtp.tracing import span

BUFFERS = 8  # sets that are made at a time; a captured exchange keeps one

_log = logging.getLogger("overlap_mtp")


class HostMetadata:
    """The metadata of a batch, the addresses of its tensors and those of its rolls, in pinned memory.

    A kernel reads it there, which saves the host a copy to the device, 20 to 60 µs a microbatch (prefetch, 2 x H100,
    h2048 and h4096). It leaves one on the device for the kernels that need it more often.
    """

    def __init__(self, plan: ExchangePlan, num_addresses: int) -> None:
        """`num_addresses` are those of a batch's tensors and of their rolls."""
        self._plan = plan
        num_words = plan.metadata_len + num_addresses
        self.tensor = torch.zeros(num_words, dtype=torch.int64, pin_memory=True, device="cpu")
        words: IntArray = self.tensor.numpy()
        self._words, self.addresses = words[: plan.metadata_len], words[plan.metadata_len :]
        self._is_written = False
        self._mark = 0

    def write(self, layout: Layout, addresses: list[int], mark: int) -> None:
        """Write the metadata, and the first addresses."""
        if isinstance(layout, DeviceLayout):
            write_references(layout, self._words, mark)
        elif layout.is_packed or not self._is_written:  # all dense layouts of one plan are the same
            write_metadata(layout, self._plan, self._words, mark)
            self._is_written = True
        else:
            self._words[FINGERPRINT] = fingerprint_of(layout.checksum, layout.batch, mark)
        self.addresses[: len(addresses)] = addresses
        self._mark = mark

    def words_for(self, layout: SequenceLayout) -> IntArray:
        """A copy with the metadata of another batch."""
        words = self.tensor.numpy().copy()
        write_metadata(layout, self._plan, words, self._mark)
        return words


class ExchangeBuffers:
    """The buffers of one exchange and the kernels that are bound to them. Later exchanges use them again."""

    send_buffer: torch.Tensor  # of the transports that have them
    recv_buffer: torch.Tensor
    send: Launch  # pack or put_unroll; after write_bounds for a DeviceLayout
    unroll: Launch | None = None  # None if the rolls are written where they are sent
    constants: ExchangeConstants
    retired: tuple[Launch | None, ...] = ()
    shared: object = None  # keeps the peers' memory mapped
    is_captured = False  # a CUDA graph uses them: no other exchange may

    def __init__(self, plan: ExchangePlan, spec: ExchangeSpec) -> None:
        self.host_metadata = HostMetadata(plan, spec.num_columns * (1 + plan.num_depths))
        self.metadata = torch.zeros_like(self.host_metadata.tensor, device=spec.device)
        self.replay_metadata = torch.full_like(self.metadata, -1)
        # What is written before anything is sent: by the host, or by `write_bounds`.
        self.source = self.metadata if spec.bounds_on_device else self.host_metadata.tensor
        self.forked, self.sent, self.unrolled = (torch.cuda.Event() for _ in range(3))  # type: ignore[no-untyped-call]
        self.last_use = self.unrolled  # or `sent`
        self.tensors: list[torch.Tensor] = []  # kept alive until the join, with a DeviceLayout's
        self.outputs: Outputs | None = None

    def load(
        self, tensors: list[torch.Tensor], addresses: list[int], layout: Layout, mark: int, outputs: Outputs
    ) -> None:
        """Say what the next exchange carries, and keep it alive."""
        self.host_metadata.write(layout, [*addresses, *outputs.addresses], mark)
        self.tensors, self.outputs = tensors, outputs
        if isinstance(layout, DeviceLayout):
            bounds = (layout.cu_seqlens, layout.cu_valid)
            self.tensors = [*tensors, *(one for one in bounds if one is not None)]

    def free(self) -> None:
        """Free the kernels' graphs and the shared memory. It must not run during a capture."""
        del self.send
        self.unroll, self.retired, self.shared = None, (), None


class CudaTransport(Transport):
    """Sends on the group's side stream (`is_overlapped`) or on the current one.

    `start` and `finish` never wait on the host. Buffers are used again after the event of their last use. The
    event is queried, never waited for: a host that runs ahead of the device gets other buffers. A transport keeps its
    buffers until `close`. An exchange that is captured in a CUDA graph keeps its buffers for good, and has to be
    started and joined in the same capture.
    """

    writes_early = False  # rolls are written where they are sent, not at the join

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._is_overlapped, self._local_len = config.is_overlapped, config.local_len
        self._side = self.group.side_stream(self.device)
        self._outputs = OutputPool(self.spec, self.plan.num_depths)
        self._parts = self.spec.parts
        self._all: list[ExchangeBuffers] = []
        self._free: deque[ExchangeBuffers] = deque()  # in the order in which they became free
        self._dropped: deque[ExchangeBuffers] = deque()
        self._wants_more = False
        self._pack_span, self._send_span = span("pack"), span("send-recv", num_bytes=self._message_bytes)
        self._join_span, self._unroll_span = span("join"), span("unroll")
        self._closer = weakref.finalize(self, abandon, self._all)
        self._closer.atexit = False
        plan_table, tensor_table = map(torch.from_numpy, (self.plan.table, self.spec.table))
        self._tables = plan_table.to(self.device), tensor_table.to(self.device)

    def _constants(self, is_replayable: bool) -> ExchangeConstants:
        return ExchangeConstants.of(self.spec, self.plan, is_replayable)

    @abstractmethod
    def _bind(self, buffers: ExchangeBuffers, first: Launch | None) -> None:
        """Bind the kernels that send and unroll to buffers, with `buffers.constants`. `first` runs before they do."""

    def _bind_all(self, buffers: ExchangeBuffers, is_replayable: bool) -> None:
        # Replays with a DeviceLayout read its bounds again.
        buffers.constants = self._constants(is_replayable and not self.spec.bounds_on_device)
        first = None
        if self.spec.bounds_on_device:
            own = (buffers.host_metadata.tensor, buffers.metadata, self.error_flags)
            first = write_bounds(*own, buffers.constants)
        self._bind(buffers, first)

    @abstractmethod
    def _send(self, buffers: ExchangeBuffers, number: int) -> None:
        """Launch pack and send/recv on the current stream."""

    def _count(self, layout: Layout) -> None:
        """Add an exchange to `traffic`."""
        self.traffic.add(len(self.plan.destinations), self._message_bytes)

    def start(
        self,
        tensors: list[torch.Tensor],
        layout: Layout,
        mark: int,
        ready: torch.cuda.Event | None = None,
    ) -> PendingExchange:
        compute = torch.cuda.current_stream(self.device)
        is_capturing = torch.cuda.is_current_stream_capturing()
        buffers = self._take_for_capture() if is_capturing else self._take()
        number = self.num_started
        self.num_started += 1
        try:
            if is_capturing:
                outputs, is_new = allocate_outputs(self.spec, tensors, self.plan.num_depths)[0], True
            else:
                outputs, is_new = self._outputs.take(tensors, compute)
            buffers.load(tensors, column_addresses(tensors, self._parts), layout, mark, outputs)
            buffers.forked.record(compute)
            if self._is_overlapped:
                # What used new memory before may run later than `ready`.
                self._send_aside(buffers, number, compute, ready, self.writes_early and is_new)
            else:
                self._send(buffers, number)
                buffers.sent.record(compute)
        except Exception:
            self._outputs.clear()  # the side stream may not have waited for their memory
            self._release(buffers)
            raise
        if self.has_peers:
            self._count(layout)
        return PendingExchange(self, number, tensors[0].shape[-1], outputs.depths, buffers, compute)

    def _send_aside(
        self,
        buffers: ExchangeBuffers,
        number: int,
        compute: torch.cuda.Stream,
        ready: torch.cuda.Event | None,
        after_both: bool,
    ) -> None:
        """Send on the side stream, after `ready` or after the work queued on the compute stream, or after both."""
        side, is_capturing = self._side, buffers.is_captured
        # The kernels count exchanges on the device, in replays, too. So an exchange must not overtake a replay: if any
        # was captured, it waits for the compute stream, and the compute stream waits for it and its peers' tokens.
        waits = not ready or after_both or (self.has_captures and not is_capturing)
        if ready:
            side.wait_event(ready)
        # `with torch.cuda.stream(side)` takes 20 to 40 µs more host time (2 x H100).
        torch.cuda.set_stream(side)
        try:
            if ready and is_capturing and not torch.cuda.is_current_stream_capturing():
                raise RuntimeError("`ready` must be recorded in the capture that the exchange is part of")
            if waits:
                side.wait_event(buffers.forked)
            self._send(buffers, number)
        finally:
            torch.cuda.set_stream(compute)
        buffers.sent.record(side)
        if self.has_captures and not is_capturing:
            compute.wait_event(buffers.sent)

    def finish(self, exchange: PendingExchange) -> Rolled:
        compute, buffers = torch.cuda.current_stream(self.device), exchange.buffers
        if torch.cuda.is_current_stream_capturing() is not buffers.is_captured:
            raise RuntimeError(
                f"exchange {exchange.number} must be joined (`at`) where it was started: both in the same capture of "
                "a CUDA graph or both outside of any"
            )
        is_elsewhere = exchange.stream != compute
        if is_elsewhere:
            # What used the memory before is ordered on the other stream only.
            compute.wait_event(buffers.forked)
            for tensor in [*buffers.tensors, *(one for rolled in exchange.depths for one in rolled.values())]:
                tensor.record_stream(compute)
        with self._join_span:
            if self._is_overlapped or is_elsewhere:
                compute.wait_event(buffers.sent)
            if buffers.unroll is not None:
                with self._unroll_span:
                    self._launch(buffers.unroll, buffers, unroll_grid(exchange.local_len, buffers.constants))
        exchange.is_done = True
        self._give_back(buffers, None if self._is_overlapped and buffers.unroll is None else compute)
        return exchange.depths

    def _launch(
        self, launch: Launch, buffers: ExchangeBuffers, grid: tuple[int, int, int] | None = None
    ) -> None:
        """On the current stream, as a graph unless one is being captured."""
        (launch if buffers.is_captured else launch.replay)(grid)

    def take_back(self, exchange: PendingExchange) -> None:
        if exchange.buffers.is_captured:
            _log.warning(
                "overlap_mtp: exchange %d was captured in a CUDA graph without its joins", exchange.number
            )
        else:
            self._dropped.append(exchange.buffers)

    def raise_if_failed(self) -> None:
        if self._dropped and not torch.cuda.is_current_stream_capturing():
            self._recover_dropped()
        super().raise_if_failed()

    def set_replay_layout(self, exchange: PendingExchange, layout: SequenceLayout) -> None:
        buffers = exchange.buffers
        if not buffers.is_captured:
            super().set_replay_layout(exchange, layout)
        if self.spec.bounds_on_device:
            raise RuntimeError(
                "replays read the bounds of a DeviceLayout in its tensors: write new ones there"
            )
        if layout.local_len != exchange.local_len:
            raise ValueError(
                f"a captured exchange keeps its length: it has {exchange.local_len} tokens a rank, the new layout has "
                f"{layout.local_len}"
            )
        buffers.replay_metadata.copy_(upload(buffers.host_metadata.words_for(layout), self.device))

    def retire(self) -> None:
        self._recover_dropped()
        if len(self._free) == len(self._all):
            self.close()
        # Otherwise the exchanges under way keep it alive, and `abandon` takes its buffers after the last one.

    def close(self) -> None:
        self._closer.detach()
        orphan(self._all)
        free_orphans()
        self._free.clear()
        self._outputs.clear()
        self._dropped.clear()
        super().close()

    def _take(self) -> ExchangeBuffers:
        """Take the buffers that have been free for longest, or make some."""
        self._recover_dropped()
        if self._wants_more or not self._free or not self._free[0].last_use.query():  # type: ignore[no-untyped-call]
            self._make_buffers()
        return self._free.popleft()

    @torch.inference_mode(False)
    def _make_buffers(self) -> None:
        self._wants_more = False
        for _ in range(BUFFERS):
            # Their memory belongs to the stream that writes it first, which may not wait for the other.
            with torch.cuda.stream(self._side if self._is_overlapped else None):
                buffers = ExchangeBuffers(self.plan, self.spec)
                self._bind_all(buffers, is_replayable=False)
            buffers.send.capture()
            if buffers.unroll is not None:
                buffers.unroll.capture(unroll_grid(self._local_len, buffers.constants))
            self._all.append(buffers)
            self._free.appendleft(buffers)

    def _take_for_capture(self) -> ExchangeBuffers:
        """Take buffers for good. Memory cannot be pinned during a capture, so a warm-up must have made them."""
        self._wants_more = True  # the next exchange outside of a capture makes them
        if not self._free or self._dropped:
            raise RuntimeError(
                f"no buffers are left for an exchange to be captured (a roller makes {BUFFERS} sets at a time, and "
                "none during a capture), or one was dropped before it was joined: run the same exchange outside of a "
                "graph, call `roller.raise_if_failed()`, and capture again"
            )
        buffers = self._free.popleft()
        # No graph may be freed while another is being captured.
        buffers.retired = buffers.send, buffers.unroll
        self._bind_all(buffers, is_replayable=True)
        buffers.is_captured = self.has_captures = True
        return buffers

    def _give_back(self, buffers: ExchangeBuffers, stream: torch.cuda.Stream | None) -> None:
        """Say that the work on `stream` is the last on these buffers; None: that before `sent` is."""
        if not buffers.is_captured:  # a graph keeps its buffers
            buffers.last_use = buffers.sent
            if stream is not None:
                buffers.last_use = buffers.unrolled
                buffers.unrolled.record(stream)
            buffers.tensors, buffers.outputs = [], None
            self._free.append(buffers)

    def _recover_dropped(self) -> None:
        while self._dropped:
            self._release(self._dropped.popleft())

    def _release(self, buffers: ExchangeBuffers) -> None:
        """Release the buffers of an exchange that will not be joined."""
        if self._is_overlapped:  # its memory is free after the side stream has used it
            rolls = buffers.outputs.depths if buffers.outputs and self.writes_early else []
            for tensor in [*buffers.tensors, *(one for rolled in rolls for one in rolled.values())]:
                tensor.record_stream(self._side)
        self._give_back(
            buffers, self._side if self._is_overlapped else torch.cuda.current_stream(self.device)
        )


def orphan(buffers: list[Any]) -> None:
    """Hand the buffers of a transport that is gone to the next `free_orphans`.

    The garbage collector calls this in any thread, perhaps in the middle of a capture. A wait would break the capture,
    and so would freeing a graph or symmetric memory.
    """
    _orphans.extend(buffers)
    buffers.clear()


def abandon(buffers: list[ExchangeBuffers]) -> None:
    """Orphan the buffers of a transport that nobody has closed, but for those in graphs, which may be replayed."""
    _in_graphs.extend(one for one in buffers if one.is_captured)
    buffers[:] = [one for one in buffers if not one.is_captured]
    orphan(buffers)


def free_orphans() -> None:
    """Free orphaned buffers once the device no longer uses them: it may still be reading their pinned memory.

    It waits for the device, so call it outside of training steps. Nothing may be captured in another thread.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    going: list[Any] = []
    with contextlib.suppress(IndexError):  # another thread may take them, too
        while True:
            going.append(_orphans.popleft())
    try:
        for device in {buffers.metadata.device for buffers in going}:
            torch.cuda.synchronize(device)
    except Exception:
        _orphans.extend(going)
        raise
    for buffers in going:
        buffers.free()


_orphans: deque[Any] = deque()
_in_graphs: list[ExchangeBuffers] = []
