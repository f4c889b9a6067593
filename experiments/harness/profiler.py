"""Letting a profiler see the rounds, and nothing before or behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


@contextlib.contextmanager
def recording(for_nsys: bool, folder: Path | None, rank: int) -> Iterator[None]:
    """Tells Nsight Systems when to listen (`--capture-range=cudaProfilerApi`), or writes `folder`/rank<r>.json.gz, a
    trace of torch.profiler; otherwise does nothing."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            yield
        profile.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))
        return
    if for_nsys:
        dist.barrier()  # the first rank to stop ends the capture of all
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    yield
    if for_nsys:
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
