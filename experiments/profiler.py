"""Letting a profiler see only the timed rounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


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
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    yield
    if for_nsys:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
