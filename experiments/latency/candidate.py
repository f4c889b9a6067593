"""One way to roll one workload: its check, its times, and its GPU time in a CUDA graph. All of it is collective."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from harness.rounds import meet, synchronize
from latency.cases import Case, new_layout
from latency.megatron_rolls import MegatronRoller
from overlap_mtp import SequenceLayout, make_roller
from overlap_mtp.schedules.roller import Rolls

MEGATRON = "megatron"
MAX_DOCUMENTS = 128  # what messages are sized for: the default of make_roller
WARM_UPS = 3
REPLAYS, GRAPH_REPEATS = 200, 7


@dataclass(frozen=True)
class Method:
    """Who rolls: a schedule and its transport, or Megatron-LM and where its cu_seqlens lie (host, device)."""

    schedule: str
    transport: str = ""


class Candidate:
    """A method at a workload on this rank, and what was measured of it."""

    def __init__(self, case: Case, method: Method) -> None:
        self.case, self.method = case, method
        self.differs = (0, 0)  # as of Case.differences
        self.sent: tuple[int, int] | None = None  # messages and bytes; None if nobody counts them
        self.times_us: dict[str, list[float]] = {"host": [], "cold": [], "wall": [], "gpu": []}
        self._packings = 0  # so far; all methods see the same ones
        self.roller: Any
        if method.schedule == MEGATRON:
            self.roller = MegatronRoller(case.group, method.transport, case.device)
        else:
            depths, most = case.workload.depths, max(MAX_DOCUMENTS, case.workload.documents)
            self.roller = make_roller(method.schedule, case.group, depths, method.transport or "auto", most)

    def warm_up(self) -> None:
        """Roll for the first times: connect, compile, compare with the oracle, count what is sent."""
        self.differs = self.case.differences(self._roll(self._argument(self.case.layout)))
        traffic = getattr(self.roller, "traffic", None)
        if traffic is not None:
            self.sent = traffic.messages, traffic.bytes
        for _ in range(WARM_UPS):
            argument = self._new_argument()
            meet(self.case.device)
            self._sample(argument)

    def time(self) -> None:
        """Time two microbatches: one on the caches that other candidates have left, and one directly after it."""
        arguments = [self._new_argument(), self._new_argument()]
        meet(self.case.device)
        (cold_us, _), (host_us, wall_us) = [self._sample(argument) for argument in arguments]
        for name, time_us in (("cold", cold_us), ("host", host_us), ("wall", wall_us)):
            self.times_us[name].append(time_us)

    def time_graph(self) -> None:
        """Measure the GPU time of a microbatch's rolls: replay a CUDA graph of several, back to back.

        A graph of a single small exchange would take as long as its launch.
        """
        graph = torch.cuda.CUDAGraph()
        exchanges = 1 if self.method.schedule in ("prefetch", "batched") else self.case.workload.depths
        captured = max(1, 8 // exchanges)  # microbatches: a roller has buffers for eight exchanges
        argument = self._argument(self.case.layout)
        for _ in range(WARM_UPS):
            self._roll(argument)
        meet(self.case.device)
        with torch.cuda.graph(graph):
            kept = [self._roll(argument) for _ in range(captured)]
        for _ in range(GRAPH_REPEATS + 1):
            meet(self.case.device)
            self.times_us["gpu"].append(_replay_us(graph) / captured)
        del self.times_us["gpu"][0]  # the first replay loads the graph
        del kept
        graph.reset()
        del graph  # a communicator cannot be destroyed as long as a graph holds it
        gc.collect()
        torch.cuda.synchronize()

    def _argument(self, layout: SequenceLayout) -> Any:
        """Return what the roller is told about a packing. A data loader would make it, so it is not timed."""
        return self.roller.argument(layout) if self.method.schedule == MEGATRON else layout

    def _new_argument(self) -> Any:
        self._packings += 1
        return self._argument(new_layout(self.case.workload, self._packings))

    def _roll(self, argument: Any) -> Rolls:
        """Roll one microbatch: start, then join every depth."""
        batch = self.case.prepared_batch if self.method.schedule == "prepared" else self.case.batch
        rolls: Rolls = self.roller.start(batch, argument)
        for depth in range(1, self.case.workload.depths + 1):
            rolls.at(depth)
        return rolls

    def _sample(self, argument: Any) -> tuple[float, float]:
        """Return the host time inside start and joins, and the wall time until the device is done, in µs."""
        begin = time.perf_counter()
        rolls = self._roll(argument)
        launched = time.perf_counter()
        synchronize(self.case.device)
        done = time.perf_counter()
        del rolls
        synchronize(self.case.device)
        return 1e6 * (launched - begin), 1e6 * (done - begin)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Return the GPU time of one of REPLAYS replays in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(1000 * begin.elapsed_time(end) / REPLAYS)
