"""Ranks that record some steps of a run, and take different times to start and to write a trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch.distributed as dist

from training import recorded

from rank_pool import RankPool


def record_a_step(group: dist.ProcessGroup) -> dict[str, tuple[float, float, timedelta]]:
    """Return by phase: when this rank had done its work, when it went on, and how long it was allowed."""
    done, ends, allowed = [], [], {}

    @contextlib.contextmanager
    def slow(profiler: str, folder: Path, rank: int) -> Iterator[None]:
        for _ in range(2):
            time.sleep(0.2 * rank)
            done.append(time.monotonic())
            if len(done) == 1:
                yield

    settings = SimpleNamespace(folder=Path("run"), steps=9, profile=1, save_deadline=77)
    with mock.patch.object(recorded, "recording", slow):
        steps = recorded.RecordedSteps(settings, 0, SimpleNamespace(phase=allowed.__setitem__), group)
        for step in range(1, 9):
            before = len(done)
            steps.before(step)
            ends += [time.monotonic()] * (len(done) - before)
    return {name: (*times, allowed[name]) for name, *times in zip(allowed, done, ends, strict=True)}


def test_no_rank_leaves_the_phase_of_a_profile_before_the_slowest(ranks: RankPool):
    found = ranks.run(record_a_step, 4)
    for phase in ("starting a profile", "writing a profile"):
        done, ends, allowed = zip(*(one[phase] for one in found), strict=True)
        assert min(ends) >= max(done), phase
        assert set(allowed) == {timedelta(seconds=77)}
