"""Some steps of a run under torch.profiler."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import torch.distributed as dist

from harness.rounds import recording
from overlap_mtp.training.watchdog import Watchdog
from training.settings import RunSettings


class RecordedSteps(contextlib.ExitStack):
    """Records `settings.profile` steps on this rank. On leaving, it writes a trace that is not yet written.

    Args:
        settings: of the run.
        steps_done: how many steps earlier processes have done. The trace begins two steps later, if enough are left.
        watchdog: is told what takes long.
        group: of all ranks. They wait in it until all have begun to record, or written. Its timeout must be above
            `settings.save_deadline`.

    Attributes:
        folder: of the traces.
        begun: whether there is one.
    """

    def __init__(
        self, settings: RunSettings, steps_done: int, watchdog: Watchdog, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.folder, self.begun = settings.folder / "profile", False
        rest = max(0, settings.steps - steps_done - settings.profile)
        warm = min(2, rest)  # the first steps allocate and compile
        self._first = steps_done + warm + 1
        self._end = self._first + settings.profile
        self._watchdog, self._allowed = watchdog, timedelta(seconds=settings.save_deadline)
        self._group = group

    def before(self, step: int) -> None:
        """Begin to record if this is the first step to record, or write the trace after the last one."""
        if step == self._first < self._end:
            self.begun = True
            self._watchdog.phase("starting a profile", self._allowed)
            self.enter_context(recording("torch", self.folder, dist.get_rank()))
            dist.barrier(self._group)  # the next phase allows the others no more than the deadline
        if self.begun and step == self._end:
            self._watchdog.phase("writing a profile", self._allowed)
            self.close()
            dist.barrier(self._group)
