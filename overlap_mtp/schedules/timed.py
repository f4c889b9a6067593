"""What rolls cost, from inside the process: no profiler, and no other step to compare with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from overlap_mtp.device_layout import Layout
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.roller import Roller, Rolls, Tokens


@dataclass(frozen=True)
class Cost:
    """The cost of the rolls since the last `read`."""

    host_us: float  # inside `start` and `at`
    stall_us: float | None  # how long they held up the compute stream; None on CPU and in captured graphs


class TimedRoller:
    """A roller that says what its rolls cost. Use it like the roller itself.

        timed = TimedRoller(roller)
        rolls = timed.start(batch, layout) ... tokens = rolls.at(depth)
        torch.cuda.synchronize(); cost = timed.read()

    It records a CUDA event on the compute stream before and after each call. If the host runs ahead of the device, the
    time between the two is what the call keeps the stream from computing: waiting for a peer, exchanging, unrolling.
    If the device waits for the host, the host's time in the call counts, too. `read` subtracts the time between two
    events with nothing between them. It adds 2 µs of host time a call.
    """

    def __init__(self, roller: Roller) -> None:
        self.roller = roller
        self.rolls: Rolls  # that were started last
        self.begun = 0  # calls of `start` and `at` so far
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._empty: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._on_gpu = False

    def start(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: Layout,
        ready: torch.cuda.Event | None = None,
    ) -> Rolls:
        """As Roller.start."""
        # A batch that is none must reach the roller, which tells all ranks.
        tensors = batch.values() if isinstance(batch, Mapping) else ()
        self._on_gpu = (
            any(getattr(one, "is_cuda", False) for one in tensors)
            and not torch.cuda.is_current_stream_capturing()
        )
        if self._on_gpu:
            self._empty.append((self._now(), self._now()))
        before = self._enter()
        self.rolls = self.roller.start(batch, layout, ready)
        self._leave(before)
        return _TimedRolls(self.rolls, self)

    def raise_if_failed(self) -> None:
        """As Roller.raise_if_failed."""
        self.roller.raise_if_failed()

    def read(self) -> Cost:
        """Return the cost since the last `read`. On CUDA, synchronise before: the device must have finished."""
        stall = None
        if self._spans:
            empty = min((a.elapsed_time(b) for a, b in self._empty), default=0.0)
            stall = 1000 * sum(max(0.0, a.elapsed_time(b) - empty) for a, b in self._spans)
        cost = Cost(1e6 * self._seconds, stall)
        self._spare += [event for pair in self._spans + self._empty for event in pair]
        self._spans, self._empty, self._seconds = [], [], 0.0
        return cost

    def _now(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _enter(self) -> tuple[torch.cuda.Event | None, float]:
        self.begun += 1
        return self._now() if self._on_gpu else None, time.perf_counter()

    def _leave(self, before: tuple[torch.cuda.Event | None, float]) -> None:
        event, begin = before
        self._seconds += time.perf_counter() - begin
        if event is not None:
            self._spans.append((event, self._now()))


class _TimedRolls(Rolls):
    def __init__(self, rolls: Rolls, timed: TimedRoller) -> None:
        self._rolls, self._timed = rolls, timed

    def at(self, depth: int) -> Tokens:
        before = self._timed._enter()
        tokens = self._rolls.at(depth)
        self._timed._leave(before)
        return tokens

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        self._rolls.set_replay_layout(layout)
