"""Profile the timed rounds, and nothing before or after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


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
