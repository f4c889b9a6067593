"""What rolls cost, from inside the process: no profiler, and no other step to compare with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from overlap_mtp.device_layout import Layout
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.activations import ActivationRoller
from overlap_mtp.schedules.roller import Roller, Rolls, Tokens


@dataclass(frozen=True)
class Cost:
    """The cost of calls since the last `read`."""

    host_us: float  # inside of them
    stall_us: float | None  # how long they held up the compute stream; None on CPU and in captured graphs


class Stopwatch:
    """Measures what runs within `with stopwatch:`.

    It records a CUDA event on the current stream before and after. If the host runs ahead of the device, the time
    between the two is what the calls keep the stream from computing: waiting for a peer, exchanging, unrolling. If the
    device waits for the host, the host's time counts, too. `read` subtracts the time between two events with nothing
    between them. The events add a few µs of host time a call, which are not counted.
    """

    def __init__(self) -> None:
        self.on_gpu = False  # whether to record events
        self._begun: tuple[list[torch.cuda.Event], float]
        self._seconds = 0.0
        # Each: two events with nothing between them, and one at the end.
        self._spans: list[list[torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._begun = [self._now(), self._now()] if self.on_gpu else [], time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        events, begin = self._begun
        self._seconds += time.perf_counter() - begin
        if events:
            self._spans.append([*events, self._now()])

    def read(self) -> Cost:
        """Return the cost since the last `read`. On CUDA, synchronise before: the device must have finished."""
        stall = None
        if self._spans:
            empty = min(before.elapsed_time(begin) for before, begin, _ in self._spans)
            stall = 1000 * sum(max(0.0, begin.elapsed_time(end) - empty) for _, begin, end in self._spans)
        cost = Cost(1e6 * self._seconds, stall)
        self._spare += [event for span in self._spans for event in span]
        self._spans, self._seconds = [], 0.0
        return cost

    def _now(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class TimedRoller:
    """A roller that says what its rolls cost. Use it like the roller itself.

        timed = TimedRoller(roller)
        rolls = timed.start(batch, layout) ... tokens = rolls.at(depth)
        torch.cuda.synchronize(); cost = timed.read()

    Of rolls of activations, `backward` measures what their backward pass costs.
    """

    def __init__(self, roller: Roller) -> None:
        self.roller = roller
        self.rolls: Rolls  # that were started last
        self.begun = 0  # calls of `start` and `at` so far
        self.forward, self.backward = Stopwatch(), Stopwatch()
        if isinstance(roller, ActivationRoller):
            roller.backward_stopwatch = self.backward

    def start(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: Layout,
        ready: torch.cuda.Event | None = None,
    ) -> Rolls:
        """As Roller.start."""
        # A batch that is none must reach the roller, which tells all ranks.
        tensors = batch.values() if isinstance(batch, Mapping) else ()
        self.forward.on_gpu = self.backward.on_gpu = (
            any(getattr(one, "is_cuda", False) for one in tensors)
            and not torch.cuda.is_current_stream_capturing()
        )
        self.begun += 1
        with self.forward:
            self.rolls = self.roller.start(batch, layout, ready)
        return _TimedRolls(self.rolls, self)

    def raise_if_failed(self) -> None:
        """As Roller.raise_if_failed."""
        self.roller.raise_if_failed()

    def read(self) -> Cost:
        """Return what `start` and `at` cost since the last `read`, as `Stopwatch.read`."""
        return self.forward.read()


class _TimedRolls(Rolls):
    def __init__(self, rolls: Rolls, timed: TimedRoller) -> None:
        self._rolls, self._timed = rolls, timed

    def at(self, depth: int) -> Tokens:
        self._timed.begun += 1
        with self._timed.forward:
            return self._rolls.at(depth)

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        self._rolls.set_replay_layout(layout)
