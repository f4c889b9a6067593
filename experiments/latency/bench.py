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

from latency.cases import EXCHANGING, Case, Configuration, Point, Subject, new_layout

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
        self.groups = _groups({one.point.cp_size for one in configurations})
        self._layout_at = {point: at for at, point in enumerate({one.point: 0 for one in configurations})}
        cases = {point: self._case(point) for point in self._layout_at}
        self.subjects = [Subject(one, cases[one.point]) for one in configurations]

    def _case(self, point: Point) -> Case:
        return Case(point, self.groups[point.cp_size], self.device, self.seed + self._layout_at[point])

    def prepare(self, rounds: int, slow_seconds: float, on_each: Callable[[], None] = lambda: None) -> None:
        """First use of every configuration: connections, compilation, its bits, and how often it will run.

        All run `rounds` times, except those of which that would take more than `slow_seconds` each.
        """
        for subject in self.subjects:
            took_us = 0.0
            with self._failures(subject):
                subject.open()
                subject.verify()
                for index in range(WARM_UPS):
                    argument = self._argument(subject, -1 - index)
                    self.meet()
                    took_us = subject.sample(argument)[1]
            everyone: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(everyone, took_us)
            subject.is_short = max(everyone) < SHORT_US
            affordable = int(1e6 * slow_seconds / max(*everyone, 1.0))
            subject.rounds = min(rounds, max(MIN_ROUNDS, affordable))
            self._agree([subject])
            on_each()

    def run(self, rounds: int, on_each: Callable[[], None] = lambda: None) -> None:
        """All rounds, each in an order of its own. A slow configuration sits out most of them, evenly."""
        gc.collect()
        gc.disable()  # a collection inside a roll would be counted as the schedule's
        try:
            for index in range(rounds):
                due = [one for one in self.subjects if one.failed is None and _is_due(one, index, rounds)]
                order = np.random.default_rng((self.seed, index)).permutation(len(due))
                for at in order:
                    with self._failures(due[at]):
                        self._time(due[at], index)
                self._agree(due)
                gc.collect()
                on_each()
        finally:
            gc.enable()

    def _time(self, subject: Subject, index: int) -> None:
        """A microbatch on whatever the others have left in the caches, then some in a row, where they are short."""
        repeats = range(1 + REPEATS if subject.is_short else 1)
        arguments = [self._argument(subject, index, repeat) for repeat in repeats]
        self.meet()
        samples = []
        for argument in arguments:
            samples.append(subject.sample(argument))
            subject.finish()
        subject.cold_us.append(samples[0][0])
        if subject.is_short:
            del samples[0]
        host_us, wall_us = np.median(samples, axis=0)
        subject.host_us.append(float(host_us))
        subject.wall_us.append(float(wall_us))

    def _argument(self, subject: Subject, index: int, repeat: int = 0) -> Any:
        """A packing that the roller has not seen, the same for all ways."""
        point = subject.configuration.point
        seed = (self.seed, self._layout_at[point], WARM_UPS + index, repeat)
        return subject.argument(new_layout(point, seed))

    def graphs(self, replays: int, repeats: int, on_each: Callable[[], None] = lambda: None) -> None:
        """GPU time of a microbatch's rolls, several captured into a CUDA graph that is replayed back to back.

        Several, because a graph with one small exchange takes as long as it takes to launch it.
        """
        for subject in self.subjects:
            if subject.failed is None and subject.configuration.way.schedule in EXCHANGING:
                self._time_graph(subject, replays, repeats)
            on_each()

    def _time_graph(self, subject: Subject, replays: int, repeats: int) -> None:
        graph, kept = torch.cuda.CUDAGraph(), None
        with self._failures(subject, "graph_failed"):
            argument = subject.argument(subject.case.layout)
            for _ in range(WARM_UPS):
                subject.roll(argument)
            self.meet()
            with torch.cuda.graph(graph):
                kept = [subject.roll(argument) for _ in range(subject.captured)]
        self._agree([subject], "graph_failed")
        if subject.graph_failed is None:
            with self._failures(subject, "graph_failed"):
                for _ in range(repeats + 1):
                    self.meet()
                    subject.gpu_us.append(_replay_us(graph, replays) / subject.captured)
                del subject.gpu_us[0]  # the first replay loads the graph
            self._agree([subject], "graph_failed")
        del kept
        graph.reset()
        del graph  # a communicator that a living graph holds cannot be destroyed
        gc.collect()
        torch.cuda.synchronize()

    def meet(self) -> None:
        """All ranks, with idle devices, at one point."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _failures(self, subject: Subject, field: str = "failed") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            setattr(subject, field, f"{type(error).__name__}: {_first_line(error)}")

    def _agree(self, subjects: list[Subject], field: str = "failed") -> None:
        """What failed on one rank has failed on all."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [getattr(one, field) for one in subjects])
        for at, subject in enumerate(subjects):
            reasons = [reasons[at] for reasons in everyone if reasons[at] is not None]
            setattr(subject, field, reasons[0] if reasons else None)

    def close(self) -> None:
        for subject in self.subjects:
            if subject.roller is not None:
                with self._failures(subject):
                    subject.roller.close()


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


def _is_due(subject: Subject, index: int, rounds: int) -> bool:
    return (index + 1) * subject.rounds // rounds > index * subject.rounds // rounds


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """GPU time of one of `replays` replays in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(1000 * begin.elapsed_time(end) / replays)
