"""Interleaved rounds on several ranks, and their profile: each round runs every candidate once, in random order."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from harness.progress import with_progress

T = TypeVar("T")
WIDTH = 200  # of tables if there is no terminal


def rank_console() -> Console:
    """Return a console that prints on rank 0 only."""
    return Console(quiet=dist.get_rank() != 0, width=None if sys.stdout.isatty() else WIDTH)


def interleaved(
    candidates: Sequence[T], rounds: int, seed: int, what: str, console: Console
) -> Iterator[tuple[int, list[T]]]:
    """Yield the index of each round and all candidates in its order, which is the same on all ranks.

    A step after a slow one finds a cooler, faster GPU, so no order is fair for all rounds. Python collects garbage
    only between rounds: a collection inside of one would be counted as a candidate's. It looks only at what the
    rounds made: all objects of Megatron-LM's modules take it 0.2 s (on a CPU machine with two cores).

    Args:
        candidates: what every round runs.
        rounds: how many.
        seed: of the orders.
        what: how the progress calls the rounds.
        console: for the progress.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for index in with_progress(range(rounds), what, console):
            order = np.random.default_rng((seed, index)).permutation(len(candidates))
            yield index, [candidates[at] for at in order]
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def meet(device: torch.device) -> None:
    """Wait until the devices of all ranks are idle. Collective."""
    synchronize(device)
    dist.barrier()
    synchronize(device)


def gather(mine: Any) -> list[Any] | None:
    """Return what all ranks hold, in rank order, on rank 0, and None on the others. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return None if dist.get_rank() else everyone


@contextlib.contextmanager
def recording(profiler: str | None, folder: Path, rank: int) -> Iterator[None]:
    """Profile the block on this rank.

    Args:
        profiler: "nsys" starts and stops a capture of Nsight Systems (`--capture-range=cudaProfilerApi`); "torch"
            writes a trace of torch.profiler; None does nothing.
        folder: where the trace `rank<rank>.json.gz` goes.
        rank: of this process.
    """
    if profiler == "torch":
        folder.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            yield
        profile.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))
        return
    if profiler == "nsys":
        dist.barrier()  # the first rank that stops ends the capture of all
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    yield
    if profiler == "nsys":
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
