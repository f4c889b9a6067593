"""Start one process per rank, unless torchrun has done so."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.multiprocessing.spawn import spawn

from harness import signals
from harness.launcher import start_and_join
from overlap_mtp.training.access import TOKEN, keep_to_loopback, new_token, reserve_port
from overlap_mtp.training.rendezvous import PeerError, connect
from overlap_mtp.training.watchdog import Watchdog, end_process


def run_on_ranks(
    function: Callable[..., None],
    ranks: int | None,
    device: str | None,
    *arguments: Any,
    deadline: timedelta | None = None,
    share_gpus: bool = False,
) -> None:
    """Call `function(device, *arguments)` on every rank, inside a process group of all ranks.

    Under torchrun, this process is one rank.

    Args:
        ranks: how many to start if torchrun has not; by default one per GPU, or two on CPU.
        device: "cuda" or "cpu"; by default CUDA if there is a GPU.
        deadline: if given, a Watchdog with this deadline is the last argument of `function`. SIGTERM and SIGUSR1 then
            end no rank: `function` asks `harness.signals.stop_signal`.
        share_gpus: allow more ranks than GPUs, to check results. This is far too slow to time.
    """
    device = choose_device(device)
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    check_gpus(ranks, device, share_gpus)
    if "RANK" in os.environ:
        _run_rank(int(os.environ["LOCAL_RANK"]), device, deadline, function, arguments)
        return
    with reserve_port() as reserved:
        host, port = reserved.getsockname()
        # Only the ranks get these variables: what this process starts later is no rank of this run.
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
        environment = {"MASTER_ADDR": host, "MASTER_PORT": str(port), TOKEN: new_token(), **sizes}
        given = (environment, device, deadline, function, arguments)
        start_and_join(
            lambda: spawn(_spawned, given, nprocs=ranks, join=False),  # type: ignore[no-untyped-call]
            # After a rank has died, the others have time to name it.
            deadline.total_seconds() / 2 if deadline else None,
        )


def check_environment() -> None:
    """Raise ValueError if the variables that torchrun sets, and that another launcher may have set, make no sense."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise ValueError(
                f"the variable {name} must be a whole number, got {value!r}: unset it, or use torchrun"
            )
    if "RANK" not in os.environ:
        return
    if missing := {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - {*os.environ}:
        raise ValueError(f"RANK is set but {min(missing)} is not: unset it, or use torchrun")
    if not int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
        raise ValueError(
            f"RANK must be below WORLD_SIZE = {os.environ['WORLD_SIZE']}, got {os.environ['RANK']}"
        )


def check_no_launcher() -> None:
    """Raise ValueError under torchrun, for a command that starts ranks several times."""
    if "RANK" in os.environ:
        raise ValueError("this command starts its own ranks: run it without torchrun, and unset RANK")


def check_gpus(ranks: int, device: str, share_gpus: bool = False) -> None:
    """Raise ValueError if this host has too few GPUs for its ranks. Under torchrun, that is its share of them."""
    gpus, seen = torch.cuda.device_count(), 1 + int(os.environ.get("LOCAL_RANK", ranks - 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", seen))
    if device == "cuda" and (here < 1 or (here > gpus and not share_gpus)):
        raise ValueError(
            f"ranks must be in [1, {gpus}] on this machine's GPUs, got {here}: or pass --device cpu"
        )


def choose_device(device: str | None) -> Literal["cuda", "cpu"]:
    """Return "cuda" or "cpu", by default CUDA if there is a GPU. Raise ValueError if the device cannot be used."""
    if device not in ("cuda", "cpu", None):
        raise ValueError(f"device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu on this machine: it has no GPU that torch can use")
    return "cuda" if device == "cuda" or (device is None and torch.cuda.is_available()) else "cpu"


def timeout_of_groups(deadline: timedelta) -> timedelta:
    """Return the timeout of collectives under a watchdog: longer, because the watchdog names the rank."""
    return 2 * deadline


def take_gpu(local_rank: int) -> torch.device:
    """Make this rank's GPU the current one. NCCL is told that ranks that share a GPU are on different hosts."""
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{local_rank // gpus}"
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)


def _spawned(rank: int, environment: dict[str, str], *rest: Any) -> None:
    os.environ.update(environment, RANK=str(rank))
    # The kernel sends SIGINT if the launcher dies. A rank that was started in a shell's background would ignore it.
    signal.signal(signal.SIGINT, signals.interrupt_once)
    try:
        signals.release((signal.SIGINT,))
        _run_rank(rank, *rest)
    except KeyboardInterrupt:  # torch would end this process with status 0
        sys.exit(signals.INTERRUPTED)


def _run_rank(
    local_rank: int,
    device: str,
    deadline: timedelta | None,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    if device == "cuda":
        here = take_gpu(local_rank)
    else:
        here = torch.device(device)
        torch.set_num_threads(1)
    keep_to_loopback()
    backend = "nccl" if device == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if deadline is None:
        signals.release(signals.STOPPING)
        dist.init_process_group(backend, store=connect(), rank=rank, world_size=world_size)
        try:
            function(here, *arguments)
        finally:
            dist.destroy_process_group()
        return
    try:
        store = connect(deadline)
        with Watchdog(store, rank, world_size, deadline) as watchdog:
            signals.listen(lambda: watchdog.status)
            watchdog.phase("joining the process group")
            groups, timeout = PrefixStore("groups", store), timeout_of_groups(deadline)
            dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
            function(here, *arguments, watchdog)
            watchdog.phase("leaving the process group")
            dist.destroy_process_group()
    except PeerError as error:  # its traceback says nothing about the peer
        end_process(str(error))  # threads of the groups may still wait for the peer
    signals.ignore()
