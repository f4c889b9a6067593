"""A worker: the process of one rank that runs cases, because it may have to be ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist

from overlap_mtp.conformance.run import run_case
from overlap_mtp.conformance.targets import load_target

CHECK_STEP = "check step"  # to a worker, in the place of a case
UNUSABLE = "unusable"  # from a worker: the target cannot be loaded


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker has to know."""

    target: str
    schedule: str
    device: str  # "cpu" or "cuda"
    rank: int
    local_rank: int
    cp_size: int
    address: tuple[str, int]
    meeting: str  # a name in the store, of these workers only
    is_on_loopback: bool


def worker_main(spec: WorkerSpec, pipe: Connection) -> None:
    """Run the cases that come through the pipe until it is closed.

    It answers ("ready", "") or (UNUSABLE, why) first, then ("done", RankResult) for a case, and ("step", bool) for
    CHECK_STEP.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that keeps this one ends it
    if spec.is_on_loopback and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        target = load_target(spec.target, spec.schedule, spec.device)
    except ValueError as error:
        pipe.send((UNUSABLE, str(error)))
        return
    if spec.device == "cuda":
        device = torch.device("cuda", spec.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    store = dist.PrefixStore(spec.meeting, dist.TCPStore(*spec.address, is_master=False))
    backend = "nccl" if spec.device == "cuda" else "gloo"
    # The timeout is none of the kit's: the process that keeps this one waits for less.
    dist.init_process_group(
        backend, store=store, rank=spec.rank, world_size=spec.cp_size, timeout=timedelta(hours=1)
    )
    group = dist.group.WORLD
    assert group is not None
    pipe.send(("ready", ""))
    number = 0
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        if case == CHECK_STEP:
            number += 1
            pipe.send(("step", _is_in_step(number, spec, device)))
        else:
            pipe.send(("done", run_case(target, case, group, device)))


def _is_in_step(number: int, spec: WorkerSpec, device: torch.device) -> bool:
    """Exchange a number with every other rank. A message that nobody read before takes its place."""

    def word(rank: int) -> torch.Tensor:
        return torch.tensor([number, rank, -number], device=device)

    others = [rank for rank in range(spec.cp_size) if rank != spec.rank]
    received = {rank: torch.zeros_like(word(rank)) for rank in others}
    work = [dist.P2POp(dist.isend, word(spec.rank), rank) for rank in others]
    work += [dist.P2POp(dist.irecv, received[rank], rank) for rank in others]
    try:
        for one in dist.batch_isend_irecv(work) if work else ():
            one.wait()
        return all(torch.equal(received[rank], word(rank)) for rank in others)
    except RuntimeError:
        return False


def _end_with_parent() -> None:
    """End this process with the one that started it, even if it hangs."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
