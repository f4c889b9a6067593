"""Run cases in worker processes, and go on with new ones after a roll that hung, crashed or raised on some ranks.

A process group is of no further use after that, so no process that has to live on joins the one that the roll uses. One
process for each rank (under torchrun) or one for all ranks (otherwise) keeps the workers and compares what they say.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

from overlap_mtp.conformance.cases import Case
from overlap_mtp.conformance.outcome import Outcome, RankResult, outcome_of
from overlap_mtp.conformance.targets import MEGATRON, MEGATRON_FUNCTION
from overlap_mtp.conformance.worker import CHECK_STEP, UNUSABLE, WorkerSpec, worker_main

START_LIMIT_S = 300.0  # imports and the first meeting of the workers
STEP_LIMIT_S = 10.0  # for the check that the process group is in step after a case
GRACE_S = 2.0  # for the other ranks after one has failed


@dataclass(frozen=True)
class ControlGroup:
    """The ranks whose workers this process keeps, and how it hears of the others."""

    cp_size: int
    ranks: range
    address: tuple[str, int]  # of the store
    store: dist.Store  # all ranks' workers meet there
    gather: Callable[[list[Any]], list[Any]]  # from one entry for each rank here to one for each rank

    @classmethod
    def here(cls, cp_size: int) -> ControlGroup:
        """All ranks on this machine, kept by this process. They meet at the loopback interface."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen(2048)
            host, port = one.getsockname()
            listener = one.detach()
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener)
        return cls(cp_size, range(cp_size), (host, port), store, lambda mine: mine)

    @classmethod
    def of_torchrun(cls) -> ControlGroup:
        """This rank of the default process group, which torchrun's variables describe. It must be a gloo group."""
        rank, cp_size = dist.get_rank(), dist.get_world_size()
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

        def gather(mine: list[Any]) -> list[Any]:
            everyone: list[Any] = [None] * cp_size
            dist.all_gather_object(everyone, mine[0])
            return everyone

        return cls(cp_size, range(rank, rank + 1), address, dist.TCPStore(*address, is_master=False), gather)


@dataclass
class Worker:
    """A process that runs cases, and the pipe to it."""

    rank: int
    process: BaseProcess
    pipe: Connection

    def answer(self) -> tuple[Any, Any] | None:
        """What it says; how it ended, as ("crashed", how), if it did; or None."""
        has_ended = self.process.exitcode is not None  # before the pipe is read: it may hold a last answer
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                said: tuple[Any, Any] = self.pipe.recv()
                return said
            if not has_ended:
                return None
        self.process.join(STEP_LIMIT_S)
        code = self.process.exitcode
        if code is not None and code < 0:
            return "crashed", f"the process was ended by {signal.Signals(-code).name}"
        return "crashed", f"the process ended with status {code}"


class WorkerPool:
    """The workers of this process's ranks."""

    def __init__(
        self, control: ControlGroup, target: str, schedule: str, device: str, deadline_s: float
    ) -> None:
        self._control, self._deadline_s = control, deadline_s
        self._target, self._schedule, self._device = target, schedule, device
        self._workers: list[Worker] = []
        self._starts, self._cases = 0, 0
        # A process that has touched a GPU must not fork. On CPU, workers share their imports: Megatron's take 5 s.
        self._context: ForkServerContext | SpawnContext = get_context("spawn")
        if device == "cpu":
            self._context = get_context("forkserver")
            megatron = [MEGATRON_FUNCTION.partition(":")[0]] if target == MEGATRON else []
            self._context.set_forkserver_preload([__name__, *megatron])

    def start(self) -> None:
        """Start workers if there are none. Raise ValueError if they cannot load the target."""
        if self._workers:
            return
        self._starts += 1
        control, meeting = self._control, f"conformance/{self._starts}"
        is_alone = len(control.ranks) == control.cp_size
        for rank in control.ranks:
            local_rank = rank if is_alone else int(os.environ["LOCAL_RANK"])
            what = (self._target, self._schedule, self._device)
            spec = WorkerSpec(*what, rank, local_rank, control.cp_size, control.address, meeting, is_alone)
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=worker_main, args=(spec, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(Worker(rank, process, ours))
        answers = control.gather(list(self._collect(START_LIMIT_S, f"{meeting}/failing").values()))
        refusals = [
            f"the workers could not start: {kind} {text}" for kind, text in answers if kind != "ready"
        ]
        if refusals:
            self.stop()
            raise ValueError(next((text for kind, text in answers if kind == UNUSABLE), refusals[0]))

    def run(self, case: Case) -> Outcome:
        """Run a case on all ranks. If the workers are then of no further use, they end."""
        began = time.monotonic()
        self.start()
        self._cases += 1
        failing = f"conformance/failing/{self._cases}"
        self._tell(case)
        results = [
            answer if kind == "done" else RankResult(rank, lost=kind, text=str(answer), waited=answer is True)
            for rank, (kind, answer) in self._collect(self._deadline_s, failing).items()
        ]
        everyone: list[RankResult] = self._control.gather(results)
        num_failed = sum(bool(one.error or one.lost) for one in everyone)
        if num_failed in (0, len(everyone)) and not any(one.lost for one in everyone):
            self._tell(CHECK_STEP)
            steps = self._collect(min(STEP_LIMIT_S, self._deadline_s), failing)
            mine = [replace(one, is_in_step=steps[one.cp_rank] == ("step", True)) for one in results]
            everyone = self._control.gather(mine)
            is_useful = all(one.is_in_step for one in everyone)
        else:
            is_useful = False
        if not is_useful:
            self.stop()
        outcome = outcome_of(case.name, everyone)
        outcome.seconds = time.monotonic() - began
        return outcome

    def stop(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(STEP_LIMIT_S)
            worker.pipe.close()
        self._workers = []

    def _tell(self, what: Case | str) -> None:
        for worker in self._workers:
            with suppress(OSError):  # it ended, which `_collect` finds
                worker.pipe.send(what)

    def _collect(self, limit_s: float, failing: str) -> dict[int, tuple[Any, Any]]:
        """What each worker of this process answers, by rank: ("crashed", how) or ("hung", ...) if it does not.

        The key `failing` of the store tells all ranks that one has failed. The others then have a moment left: it is
        ("hung", True) if that was not enough.
        """
        answers: dict[int, tuple[Any, Any]] = {}
        end, has_failed = time.monotonic() + limit_s, False
        while len(answers) < len(self._workers) and time.monotonic() < end:
            waiting = [one for one in self._workers if one.rank not in answers]
            wait([one.pipe for one in waiting] + [one.process.sentinel for one in waiting], timeout=0.2)
            for worker in waiting:
                if (answer := worker.answer()) is not None:
                    answers[worker.rank] = answer
                    if _is_failure(*answer):
                        self._control.store.set(failing, "")
            if not has_failed and self._control.store.check([failing]):
                has_failed, end = True, min(end, time.monotonic() + GRACE_S)
        return {one.rank: answers.get(one.rank, ("hung", has_failed)) for one in self._workers}


def _is_failure(kind: str, answer: Any) -> bool:
    """Whether the workers of other ranks may wait in vain for one that gave this answer."""
    return kind in ("crashed", UNUSABLE) or answer is False or (kind == "done" and bool(answer.error))


def check_in_workers(
    control: ControlGroup,
    cases: Iterable[Case],
    target: str,
    schedule: str = "prefetch",
    device: str = "cpu",
    deadline_s: float = 30.0,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Check a roll in worker processes: one that hangs, crashes or raises on some ranks costs one case.

    Args:
        control: `ControlGroup.here(cp_size)`, or `ControlGroup.of_torchrun()` on all ranks that torchrun started.
        cases: from `cases_for`, for as many ranks.
        target: what `load_target` takes.
        schedule: the same.
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU for each rank).
        deadline_s: a case that takes longer hangs.
        on_outcome: called after each case.

    Returns:
        The outcomes, the same on all ranks.

    Raises:
        ValueError: if the target cannot be loaded or the workers cannot start.
    """
    pool, outcomes = WorkerPool(control, target, schedule, device, deadline_s), []
    try:
        pool.start()
        for case in cases:
            outcomes.append(pool.run(case))
            on_outcome(outcomes[-1])
    finally:
        pool.stop()
    return outcomes
