"""Time many configurations of rolls in interleaved rounds, and each of them as a CUDA graph."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from latency.cases import EXCHANGING, Candidate, Case, Configuration, new_layout

WARM_UPS = 3
MIN_ROUNDS = 5
REPEATS = 5  # in a row, of a short configuration
SHORT_US = 5_000


class Bench:
    """All configurations on this rank. Every method is collective over all ranks.

    If a configuration raises on one rank, all ranks leave it out from then on, and its record says why.
    """

    def __init__(self, configurations: list[Configuration], device: torch.device, seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self.groups = _groups({one.workload.cp_size for one in configurations})
        workloads = dict.fromkeys(one.workload for one in configurations)
        self._seeds = {workload: seed + at for at, workload in enumerate(workloads)}
        cases = {one: Case(one, self.groups[one.cp_size], device, self._seeds[one]) for one in workloads}
        self.candidates = [Candidate(one, cases[one.workload]) for one in configurations]

    def prepare(self, rounds: int, slow_seconds: float, on_each: Callable[[], None] = lambda: None) -> None:
        """Use every configuration for the first time: connect, compile, check its bits, choose its rounds.

        Args:
            rounds: how often a configuration will run.
            slow_seconds: a configuration that would take longer than this in all rounds runs in fewer of them.
            on_each: is called after each configuration.
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

    def run(self, rounds: int, on_round: Callable[[], None] = lambda: None) -> None:
        """Run all rounds, each in another random order. A slow configuration runs in few of them, evenly spread.

        Args:
            rounds: as for `prepare`.
            on_round: is called after each round.
        """
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
                on_round()
        finally:
            gc.enable()

    def _time(self, candidate: Candidate, index: int) -> None:
        """Time a microbatch on the caches that others have left, then some in a row if they are short."""
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
        """Return a packing that the roller has not seen, the same for all methods."""
        workload = candidate.configuration.workload
        seed = (self.seed, self._seeds[workload], WARM_UPS + index, repeat)
        return candidate.argument(new_layout(workload, seed))

    def graphs(self, replays: int, repeats: int, on_each: Callable[[], None] = lambda: None) -> None:
        """Measure the GPU time of a microbatch's rolls: replay a CUDA graph of several, back to back.

        A graph of a single small exchange would take as long as its launch.

        Args:
            replays: how often a graph is replayed in a row.
            repeats: how often that is measured.
            on_each: is called after each configuration.
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
        del graph  # a communicator cannot be destroyed as long as a graph holds it
        gc.collect()
        torch.cuda.synchronize()

    def meet(self) -> None:
        """Wait until the devices of all ranks are idle."""
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
        """Make a failure on one rank a failure on all."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [getattr(one, field) for one in candidates])
        for at, candidate in enumerate(candidates):
            reasons = [reasons[at] for reasons in everyone if reasons[at] is not None]
            setattr(candidate, field, reasons[0] if reasons else None)

    def close(self) -> None:
        """Close all rollers."""
        for candidate in self.candidates:
            if candidate.roller is not None:
                with self._failures(candidate):
                    candidate.roller.close()


def _groups(sizes: set[int]) -> dict[int, dist.ProcessGroup]:
    """Return this rank's group of each size. Neighbouring ranks form a group."""
    world = dist.group.WORLD
    assert world is not None
    groups = {world.size(): world}
    for size in sorted(sizes - {world.size()}):
        if world.size() % size:
            raise ValueError(f"cp sizes must divide the number of ranks {world.size()}, got {size}")
        groups[size], _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
    return groups


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the folders of any file that it names."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"(/[\w.+-]+)+/", "", line)[:300]


def _is_due(candidate: Candidate, index: int, rounds: int) -> bool:
    return (index + 1) * candidate.rounds // rounds > index * candidate.rounds // rounds


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Return the GPU time of one of `replays` replays in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(1000 * begin.elapsed_time(end) / replays)
