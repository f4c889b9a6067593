"""Ranks under a watchdog, in real processes: one of them commits a fault."""

from __future__ import annotations

import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harness.launch import take_gpu
from overlap_mtp.training.access import reserve_port
from overlap_mtp.training.rendezvous import connect
from overlap_mtp.training.watchdog import Watchdog, collectives_begun

from rank_pool import forks

DEADLINE_S = {"gloo": 4.0, "nccl": 16.0}  # a GPU's first calls hold Python's lock for seconds
SLACK_S = 4.0  # for a process to end
EVER_S = 1000.0


class Scenario(NamedTuple):
    """Ten steps of all-reduces. In step 3, rank `odd` does what `fault` says while the others are elsewhere.

    The `others` are in their all-reduce ("reduce"), which they may also follow ("follow"). Or they are in that step
    ("spin") or in the next one ("spin ahead") as in a kernel that spins: no exception ever comes. "one works": rank 0
    is in a receive, rank 1 is busy. "join": before the steps, the others wait for the store in init_process_group.

    Faults are "is killed", "is frozen", "raises", "seems lost" and "sleeps". With "is absent", rank `odd` is never
    started. With "ends apart" and "pauses", there is no fault: rank 2 is there for longer than the deadline after
    rank 0, which holds the store, is done; and all are stopped for longer than a single rank may be silent.
    """

    fault: str
    odd: int = -1
    others: str = "spin"
    backend: str = "gloo"
    world_size: int = 3


def commit(fault: str) -> None:
    if fault in ("is killed", "is frozen"):
        os.kill(os.getpid(), signal.SIGKILL if fault == "is killed" else signal.SIGSTOP)
    if fault == "raises":
        raise ValueError("a batch of nonsense")
    if fault == "seems lost":
        raise RuntimeError("Connection closed by peer")
    time.sleep(EVER_S)


def take_steps(scenario: Scenario, rank: int, here: Path) -> None:
    fault, odd, others, backend, world_size = scenario
    deadline = timedelta(seconds=DEADLINE_S[backend])
    store = connect(timedelta(seconds=2 if fault == "is absent" else 60))
    with Watchdog(store, rank, world_size, deadline) as watchdog:
        device = take_gpu(rank) if backend == "nccl" else torch.device("cpu")
        ones = torch.ones(1, device=device)
        watchdog.phase("joining")
        if others == "join":
            time.sleep(0.5)
            if rank == odd:
                here.touch()
                commit(fault)
        groups = dist.PrefixStore("groups", store)
        timeout = deadline * 10
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
        if others == "follow":
            watchdog.follow(collectives_begun(dist.group.WORLD))
        for step in range(10):
            watchdog.phase(f"step {step}")
            if step == 3:
                time.sleep(0.5)  # so that all have heard where the others are
                if rank == odd:
                    here.touch()
                    commit(fault)
                elif others == "one works":
                    dist.recv(ones, src=odd) if rank == 0 else time.sleep(EVER_S)
                elif others.startswith("spin"):
                    watchdog.phase("step 4") if others == "spin ahead" else None
                    time.sleep(EVER_S)
            dist.all_reduce(ones)
            if device.type == "cuda":
                if others != "follow":
                    watchdog.phase(f"step {step}: waiting")
                torch.cuda.synchronize()
        dist.destroy_process_group()


def leave(rank: int, here: Path) -> None:
    with Watchdog(connect(), rank, 3, timedelta(seconds=2)) as watchdog:
        here.touch()
        for tenth in range((5, 17, 33)[rank]):
            watchdog.phase(f"tenth {tenth}")
            time.sleep(0.1)


def rank_main(scenario: Scenario, rank: int, port: int, folder: Path) -> None:
    size = str(scenario.world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=size)
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    try:
        if scenario.fault in ("ends apart", "pauses"):
            leave(rank, folder / f"{rank}.here")
        else:
            take_steps(scenario, rank, folder / f"{rank}.here")
    except Exception:
        traceback.print_exc()
        os._exit(1)  # at once: the others must have learned of it before it left the watchdog


def run(scenario: Scenario, folder: Path) -> dict[int, tuple[int, str]]:
    """Return the exit status and stderr of each rank. All must end by themselves, within the deadline."""
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    fault, odd, _, backend, world_size = scenario
    context = forks() if backend == "gloo" else mp.get_context("spawn")
    started = [rank for rank in range(world_size) if fault != "is absent" or rank != odd]
    arguments = {rank: (scenario, rank, port, folder) for rank in started}
    processes = {rank: context.Process(target=rank_main, args=arguments[rank]) for rank in started}
    try:
        for process in processes.values():
            process.start()
        at_fault = {"is absent": 0, "pauses": world_size}.get(fault, 1)
        end = time.monotonic() + 60
        while len(list(folder.glob("*.here"))) < at_fault:
            assert time.monotonic() < end, [path.read_text() for path in folder.glob("*.err")]
            time.sleep(0.01)
        for number in (signal.SIGSTOP, signal.SIGCONT) if fault == "pauses" else ():
            for process in processes.values():
                os.kill(process.pid, number)
            time.sleep(2.5 if number == signal.SIGSTOP else 0)
        for ranks in (
            set(started) - {odd},
            set(started) & {odd},
        ):  # a frozen rank continues after the others' end
            for rank in ranks if fault == "is frozen" and odd in ranks else ():
                os.kill(processes[rank].pid, signal.SIGCONT)
            end = time.monotonic() + DEADLINE_S[backend] + SLACK_S
            for rank in ranks:
                processes[rank].join(max(0.1, end - time.monotonic()))
                assert processes[rank].exitcode is not None, f"rank {rank} is left over"
        return {rank: (one.exitcode, (folder / f"{rank}.err").read_text()) for rank, one in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.join()
        reserved.close()
