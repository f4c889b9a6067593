"""A pool of rank processes: a call costs 20 ms, not a start.

`pool.run(function, cp_size, *args)` calls `function(group, *args)` on ranks 0 .. cp_size - 1, where `group` is their
process group, and returns the results in rank order. Gloo on loopback, or NCCL if there are GPUs.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harness.launch import take_gpu
from overlap_mtp.exchange.group import exchange_group_of

# The server that CPU ranks are forked from imports these once: a pool starts in a quarter of a second.
IMPORTED_ONCE = ["overlap_mtp.training.checkpoint", "overlap_mtp.training.trainer", "torch._dynamo"]
IMPORTED_ONCE += ["hypothesis", "pytest", "rich.progress", "tyro"]


def forks() -> ForkServerContext:
    """Starts processes that share their imports."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


TIMEOUT_S = 6  # long enough for a first microbatch on a busy machine


class RankError(Exception):
    """An exception on a rank, with its traceback there."""


class RankPool(AbstractContextManager["RankPool"]):
    def __init__(
        self,
        world_size: int,
        backend: str = "gloo",
        timeout_s: float = 60,
        sizes: Collection[int] = (2, 3, 4),
    ) -> None:
        """`sizes`: of the groups to make beside that of all ranks. Idle, these of eight ranks take 13 % of a core."""
        self.world_size, self.backend, self.timeout_s, self.sizes = world_size, backend, timeout_s, sizes
        self._start()

    def _start(self) -> None:
        context = forks() if self.backend == "gloo" else mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, self.sizes, self.backend, store, self.timeout_s, theirs)
            process = context.Process(target=_rank_main, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], cp_size: int, *args: Any, limit_s: float = 400) -> list[Any]:
        """Return the results by rank.

        If ranks fail, die or hang, the pool starts again, and this raises RankError with the tracebacks of all that
        failed: a group is of no further use after a failed collective.
        """
        for pipe in self._pipes[:cp_size]:
            pipe.send((function, cp_size, args))
        deadline, answers = time.monotonic() + limit_s, []
        for pipe in self._pipes[:cp_size]:
            try:
                has_answered = pipe.poll(max(0, deadline - time.monotonic()))
                answers.append(pipe.recv() if has_answered else (False, f"no answer within {limit_s} s"))
            except (EOFError, OSError):
                answers.append((False, "died"))
        failures = [f"--- rank {rank}\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        if failures:
            self.restart()
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

    def check(self, function: Callable[..., list[str]], cp_size: int, *args: Any) -> None:
        """Run a function that lists what is wrong, and fail unless that is nothing on every rank."""
        wrong = self.run(function, cp_size, *args)
        assert wrong == [[]] * cp_size, wrong

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def __exit__(self, *_: object) -> None:
        self.close()


def _rank_main(
    rank: int,
    world_size: int,
    sizes: Collection[int],
    backend: str,
    store: str,
    timeout_s: float,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        if world_size > torch.cuda.device_count():
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        take_gpu(rank)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, f"file://{store}", timeout, world_size, rank)
    groups = _make_groups(rank, world_size, sizes, timeout)
    while True:
        try:
            function, cp_size, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(groups[cp_size], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _make_groups(
    rank: int, world_size: int, sizes: Collection[int], timeout: timedelta
) -> dict[int, dist.ProcessGroup]:
    """A group of the first n ranks for each of these sizes and for all ranks, and its exchange group."""
    groups = {}
    for size in sorted({*sizes, world_size} & set(range(1, world_size + 1))):
        group = dist.new_group(list(range(size)), timeout=timeout)
        if rank < size:
            assert group is not None
            groups[size] = group
            assert exchange_group_of(group).process_group is not None
    return groups


def fresh_group(world: dist.ProcessGroup, timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup:
    """A cp group with its exchange group made."""
    group = dist.new_group(list(range(world.size())), timeout=timedelta(seconds=timeout_s))
    assert group is not None
    assert exchange_group_of(group).process_group is not None
    return group


def run_on_forks(
    function: Callable[..., None], ranks: int, _device: str, *arguments: Any, share_gpus: bool = False
) -> None:
    """Do what `launch.run_on_ranks` does on CPU. There each rank imports torch for itself: 3 s of a core."""
    with RankPool(ranks, sizes=()) as pool:
        pool.run(_on_cpu, ranks, function, arguments, limit_s=600)


def _on_cpu(_group: dist.ProcessGroup, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(torch.device("cpu"), *arguments)


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where this rank's tensors belong."""
    if group is not None and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
