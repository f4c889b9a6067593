"""Timing many configurations of rolls in interleaved rounds, and what one of them costs as a CUDA graph."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from latency.cases import EXCHANGING, Candidate, Case, Configuration, Workload, new_layout

WARM_UPS = 3
MIN_ROUNDS = 5
REPEATS = 5  # of a short configuration in a row
SHORT_US = 5_000


class Bench:
    """All configurations on this rank. Every method is collective over all ranks.

    A configuration that raises on one rank is left out on all of them from then on, and says why.
    """

    def __init__(self, configurations: list[Configuration], device: torch.device, seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.groups = _groups({one.workload.cp_size for one in configurations})
        self._layout_at = {
            workload: at for at, workload in enumerate({one.workload: 0 for one in configurations})
        }
        cases = {workload: self._case(workload) for workload in self._layout_at}
        self.candidates = [Candidate(one, cases[one.workload]) for one in configurations]

    def _case(self, workload: Workload) -> Case:
        return Case(
            workload, self.groups[workload.cp_size], self.device, self.seed + self._layout_at[workload]
        )

    def prepare(self, rounds: int, slow_seconds: float, on_each: Callable[[], None] = lambda: None) -> None:
        """First use of every configuration: connections, compilation, its bits, and how often it will run.

        All run `rounds` times, except those of which that would take more than `slow_seconds` each.
        """
        for candidate in self.candidates:
            took_us = 0.0
            with self._failures(candidate):
                candidate.open()
                candidate.verify()
                for index in range(WARM_UPS):
                    argument = self._argument(candidate, -1 - index)
                    self.meet()
                    took_us = candidate.sample(argument)[1]
            everyone: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(everyone, took_us)
            candidate.is_short = max(everyone) < SHORT_US
            affordable = int(1e6 * slow_seconds / max(*everyone, 1.0))
            candidate.rounds = min(rounds, max(MIN_ROUNDS, affordable))
            self._agree([candidate])
            on_each()

    def run(self, rounds: int, on_each: Callable[[], None] = lambda: None) -> None:
        """All rounds, each in an order of its own. A slow configuration sits out most of them, evenly."""
        gc.collect()
        gc.disable()  # a collection inside a roll would be counted as the schedule's
        try:
            for index in range(rounds):
                due = [one for one in self.candidates if one.failed is None and _is_due(one, index, rounds)]
                order = np.random.default_rng((self.seed, index)).permutation(len(due))
                for at in order:
                    with self._failures(due[at]):
                        self._time(due[at], index)
                self._agree(due)
                gc.collect()
                on_each()
        finally:
            gc.enable()

    def _time(self, candidate: Candidate, index: int) -> None:
        """A microbatch on whatever the others have left in the caches, then some in a row, where they are short."""
        repeats = range(1 + REPEATS if candidate.is_short else 1)
        arguments = [self._argument(candidate, index, repeat) for repeat in repeats]
        self.meet()
        samples = []
        for argument in arguments:
            samples.append(candidate.sample(argument))
            candidate.finish()
        candidate.cold_us.append(samples[0][0])
        if candidate.is_short:
            del samples[0]
        host_us, wall_us = np.median(samples, axis=0)
        candidate.host_us.append(float(host_us))
        candidate.wall_us.append(float(wall_us))

    def _argument(self, candidate: Candidate, index: int, repeat: int = 0) -> Any:
        """A packing that the roller has not seen, the same for all methods."""
        workload = candidate.configuration.workload
        seed = (self.seed, self._layout_at[workload], WARM_UPS + index, repeat)
        return candidate.argument(new_layout(workload, seed))

    def graphs(self, replays: int, repeats: int, on_each: Callable[[], None] = lambda: None) -> None:
        """GPU time of a microbatch's rolls, several captured into a CUDA graph that is replayed back to back.

        Several, because a graph with one small exchange takes as long as it takes to launch it.
        """
        for candidate in self.candidates:
            if candidate.failed is None and candidate.configuration.method.schedule in EXCHANGING:
                self._time_graph(candidate, replays, repeats)
            on_each()

    def _time_graph(self, candidate: Candidate, replays: int, repeats: int) -> None:
        graph, kept = torch.cuda.CUDAGraph(), None
        with self._failures(candidate, "graph_failed"):
            argument = candidate.argument(candidate.case.layout)
            for _ in range(WARM_UPS):
                candidate.roll(argument)
            self.meet()
            with torch.cuda.graph(graph):
                kept = [candidate.roll(argument) for _ in range(candidate.captured)]
        self._agree([candidate], "graph_failed")
        if candidate.graph_failed is None:
            with self._failures(candidate, "graph_failed"):
                for _ in range(repeats + 1):
                    self.meet()
                    candidate.gpu_us.append(_replay_us(graph, replays) / candidate.captured)
                del candidate.gpu_us[0]  # the first replay loads the graph
            self._agree([candidate], "graph_failed")
        del kept
        graph.reset()
        del graph  # a communicator that a living graph holds cannot be destroyed
        gc.collect()
        torch.cuda.synchronize()

    def meet(self) -> None:
        """All ranks, with idle devices, at one workload."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _failures(self, candidate: Candidate, field: str = "failed") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            setattr(candidate, field, f"{type(error).__name__}: {_first_line(error)}")

    def _agree(self, candidates: list[Candidate], field: str = "failed") -> None:
        """What failed on one rank has failed on all."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [getattr(one, field) for one in candidates])
        for at, candidate in enumerate(candidates):
            reasons = [reasons[at] for reasons in everyone if reasons[at] is not None]
            setattr(candidate, field, reasons[0] if reasons else None)

    def close(self) -> None:
        for candidate in self.candidates:
            if candidate.roller is not None:
                with self._failures(candidate):
                    candidate.roller.close()


def _groups(sizes: set[int]) -> dict[int, dist.ProcessGroup]:
    """This rank's group of each size; ranks of one host stand next to each other."""
    world = dist.group.WORLD
    assert world is not None
    groups = {world.size(): world}
    for size in sorted(sizes - {world.size()}):
        if world.size() % size:
            raise ValueError(f"cp sizes must divide the number of ranks {world.size()}, got {size}")
        groups[size], _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
    return groups


def _first_line(error: Exception) -> str:
    """What an error says first, without the folders of any file that it names."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"(/[\w.+-]+)+/", "", line)[:300]


def _is_due(candidate: Candidate, index: int, rounds: int) -> bool:
    return (index + 1) * candidate.rounds // rounds > index * candidate.rounds // rounds


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """GPU time of one of `replays` replays in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(1000 * begin.elapsed_time(end) / replays)
