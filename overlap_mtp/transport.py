"""Moving packed tokens between context-parallel ranks.

A transport has two verbs. `launch` packs and sends, and returns at once; `land` waits for what peers sent and
writes the rolled tensors. It knows plans and kernels, not schedules: when to launch and when to land is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from overlap_mtp.channel import Channel
from overlap_mtp.kernels import reference
from overlap_mtp.plan import PlanShape
from overlap_mtp.tracing import span

TRANSPORTS = ("auto", "process_group")
WORD_BYTES = 8


@dataclass
class Traffic:
    """What a rank has sent: messages (one per peer and exchange) and their bytes."""

    messages: int = 0
    bytes: int = 0

    def add(self, messages: int, num_bytes: int) -> None:
        self.messages += messages
        self.bytes += num_bytes


@dataclass
class Buffers:
    """The wires of one exchange. They go back to the ring when `landed` has passed."""

    send: torch.Tensor  # int64 [num_send_rows, words]
    recv: torch.Tensor  # int64 [num_recv_rows, words]
    forked: Any = None  # CUDA events; none on CPU
    sent: Any = None
    landed: Any = None


@dataclass
class Flight:
    """One exchange under way, and all that must stay alive until it has landed."""

    number: int
    tensors: Sequence[torch.Tensor]
    table: torch.Tensor
    buffers: Buffers
    work: dist.Work | None = None


class Transport(Protocol):
    def launch(self, tensors: Sequence[torch.Tensor], table: torch.Tensor) -> Flight: ...

    def land(self, flight: Flight, outputs: Sequence[torch.Tensor], fills: Sequence[int]) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class ProcessGroupTransport:
    """Send/recv by `all_to_all_single` over the exchange group (NCCL or gloo): one message a peer.

    On CUDA, `overlapped` runs pack and send/recv on the channel's side stream; otherwise they run on the
    current stream, which then waits for the peers. On CPU gloo sends in a thread of its own; `land` waits.
    A plan that differs between two ranks is found when its header lands: at once on CPU, and on CUDA without
    a synchronisation, so that `check` may raise a step later. A peer that never comes is an error that names the
    exchange on gloo; on NCCL the watchdog ends the process after the group's timeout and names the exchange group.
    """

    channel: Channel
    shape: PlanShape
    words: int  # int64 words of one row: tensors times batch rows
    device: torch.device
    overlapped: bool
    traffic: Traffic
    _free: list[Buffers] = field(default_factory=list)
    _launched: int = 0

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        # In pinned memory the kernel writes it where the host reads it without waiting.
        self._mismatch = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self._seen = self._mismatch.numpy()
        self._kernels: Any = reference
        self._send_rows, self._recv_rows = list(self.shape.send_rows), list(self.shape.recv_rows)
        self._message_bytes = WORD_BYTES * self.words * self.shape.num_send_rows
        if on_gpu:
            from overlap_mtp.kernels import pack, unroll  # Triton is compiled for a GPU only

            self._kernels = _Compiled(pack.pack, unroll.unroll)
            if self._has_peers:
                self._warm_up()

    @property
    def _has_peers(self) -> bool:
        return bool(self.shape.sources or self.shape.destinations)

    def launch(self, tensors: Sequence[torch.Tensor], table: torch.Tensor) -> Flight:
        """Packs `tensors` ([B, L], integer views) by `table` and sends them. Never blocks the host."""
        buffers = self._free.pop() if self._free else self._new_buffers()
        flight = Flight(self._launched, tensors, table, buffers)
        self._launched += 1
        if not self._has_peers:
            return flight
        if self.device.type == "cuda" and self.overlapped:
            self._launch_on_side_stream(flight)
        else:
            if buffers.landed is not None:
                torch.cuda.current_stream(self.device).wait_event(buffers.landed)
            self._kernels.pack(tensors, table, self.shape, buffers.send)
            with self.channel.named_errors(self._name(flight)):
                flight.work = self._exchange(buffers, async_op=self.device.type == "cpu")
        self.traffic.add(len(self.shape.destinations), self._message_bytes)
        return flight

    def land(self, flight: Flight, outputs: Sequence[torch.Tensor], fills: Sequence[int]) -> None:
        """Waits for the flight and writes the rolls of all tensors and depths ([D * B, L], integer views)."""
        buffers = flight.buffers
        if flight.work is not None:
            with self.channel.named_errors(self._name(flight)):
                flight.work.wait()
        compute = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if compute is not None and self.overlapped:
            compute.wait_event(buffers.sent)
        with span("join"), span("unroll"):
            self._kernels.unroll(
                flight.tensors, outputs, fills, flight.table, self.shape, buffers.recv, self._mismatch
            )
        if buffers.landed is not None:
            buffers.landed.record(compute)
        self._free.append(buffers)

    def check(self) -> None:
        """Raises RuntimeError if a peer's plan was found to differ. Never waits."""
        if self._seen[0]:
            peer = self.shape.sources[int(self._seen[0]) - 1]
            self._seen[0] = 0
            raise RuntimeError(
                f"overlap_mtp: cp rank {peer} exchanged tokens by another plan than cp rank {self.shape.cp_rank} "
                f"(in one of the exchanges up to number {self._launched - 1}): all ranks of a cp group must "
                "pass the same layout (cu_seqlens, valid_lengths) for the same microbatch"
            )

    def close(self) -> None:
        """Lets the buffers go, on CUDA when all that uses them has run."""
        if self.device.type == "cuda":
            self.channel.side_stream(self.device).synchronize()
            torch.cuda.current_stream().synchronize()
        self._free.clear()
        self.check()

    def _launch_on_side_stream(self, flight: Flight) -> None:
        buffers, side = flight.buffers, self.channel.side_stream(self.device)
        compute = torch.cuda.current_stream(self.device)
        buffers.forked.record(compute)
        torch.cuda.set_stream(side)  # half the host time of `with torch.cuda.stream(side)`
        try:
            side.wait_event(buffers.forked)
            side.wait_event(buffers.landed)  # passes at once unless the buffers' last unroll still reads them
            with span("pack"):
                self._kernels.pack(flight.tensors, flight.table, self.shape, buffers.send)
            with span("send-recv", num_bytes=self._message_bytes), self.channel.named_errors(self._name(flight)):
                self._exchange(buffers, async_op=False)
            buffers.sent.record(side)
        finally:
            torch.cuda.set_stream(compute)
        for tensor in (*flight.tensors, flight.table):
            tensor.record_stream(side)

    def _exchange(self, buffers: Buffers, async_op: bool) -> dist.Work | None:
        work: dist.Work | None = dist.all_to_all_single(
            buffers.recv,
            buffers.send,
            self._recv_rows,
            self._send_rows,
            group=self.channel.group,
            async_op=async_op,
        )
        return work

    def _new_buffers(self) -> Buffers:
        send = torch.zeros(self.shape.num_send_rows, self.words, dtype=torch.int64, device=self.device)
        recv = torch.zeros(self.shape.num_recv_rows, self.words, dtype=torch.int64, device=self.device)
        if self.device.type == "cpu":
            return Buffers(send, recv)
        if self.overlapped:  # a flight that is dropped before it landed frees them while they are in use
            for wire in (send, recv):
                wire.record_stream(self.channel.side_stream(self.device))
        return Buffers(send, recv, *(torch.cuda.Event() for _ in range(3)))  # type: ignore[no-untyped-call]

    def _warm_up(self) -> None:
        """NCCL connects two ranks when they first exchange, which blocks the host: better now than later."""
        buffers = self._new_buffers()
        with self.channel.named_errors("connecting to its neighbours"):
            self._exchange(buffers, async_op=False)
            torch.cuda.current_stream(self.device).synchronize()
        self._free.append(buffers)

    def _name(self, flight: Flight) -> str:
        return f"exchange {flight.number} ({self.shape.num_depths} depths, {self._message_bytes} bytes sent)"


@dataclass(frozen=True)
class _Compiled:
    pack: Any
    unroll: Any
