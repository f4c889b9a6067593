"""Starting one process per rank, where torchrun has not done so already."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.multiprocessing.spawn import spawn

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
    """Calls `function(device, *arguments)` on every rank, inside a process group over all of them.

    Under torchrun this process is one rank. Otherwise starts `ranks` of them here: by default one for each GPU, or
    two on CPU. `device`: "cuda" or "cpu", by default CUDA where there is any. With a `deadline` a watchdog looks after
    the ranks, which `function` is given last. With `share_gpus` there may be more ranks than GPUs: good to see that
    results are right, far too slow to time.
    """
    device = choose_device(device)
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    check_gpus(ranks, device, share_gpus)
    if "RANK" in os.environ:
        _rank_main(int(os.environ["LOCAL_RANK"]), device, deadline, function, arguments)
        return
    # Theirs isolated: what this process starts later is no rank of this run.
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    context = spawn(  # type: ignore[no-untyped-call]
        _spawned, (environment, device, deadline, function, arguments), nprocs=ranks, join=False
    )
    # Ranks that are left find out who is gone, and say so, before they are ended; who is frozen is killed after that.
    while not context.join(grace_period=deadline.total_seconds() / 2 if deadline else None):
        pass


def check_gpus(ranks: int, device: str, share_gpus: bool = False) -> None:
    """Raises ValueError where this host has too few GPUs for its share of `ranks`, which torchrun knows."""
    gpus, seen = torch.cuda.device_count(), 1 + int(os.environ.get("LOCAL_RANK", ranks - 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", seen))
    if device == "cuda" and (here < 1 or (here > gpus and not share_gpus)):
        raise ValueError(
            f"ranks must be in [1, {gpus}] on this machine's GPUs, got {here}: or pass --device cpu"
        )


def choose_device(device: str | None) -> str:
    """cuda or cpu; by default CUDA where there is any. Raises ValueError where it cannot be that."""
    if device not in ("cuda", "cpu", None):
        raise ValueError(f"device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu on this machine: it has no GPU that torch can use")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _spawned(
    rank: int,
    environment: dict[str, str],
    device: str,
    deadline: timedelta | None,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment, RANK=str(rank))
    # What torch has the kernel send where the launcher dies; started in a shell's background it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _rank_main(rank, device, deadline, function, arguments)


def _rank_main(
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
    backend = "nccl" if device == "cuda" else "gloo"
    if deadline is None:
        dist.init_process_group(backend)
        try:
            function(here, *arguments)
        finally:
            dist.destroy_process_group()
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = connect(deadline)
        with Watchdog(store, rank, world_size, deadline) as watchdog:
            _speak_when_ended(watchdog)
            watchdog.phase("joining the process group")
            groups = PrefixStore("groups", store)
            patience = timeout_of_groups(deadline)
            dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=patience)
            function(here, *arguments, watchdog)
            watchdog.phase("leaving the process group")
            dist.destroy_process_group()
    except PeerError as error:  # whose traceback says nothing of the peer
        end_process(str(error))  # the groups' threads may still wait for it


def timeout_of_groups(deadline: timedelta) -> timedelta:
    """Of collectives among ranks that a watchdog looks after: it is faster, and says who."""
    return 2 * deadline


def take_gpu(local_rank: int) -> torch.device:
    """This rank's GPU, made the current one. Ranks that share one must look to NCCL as if on different hosts."""
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{local_rank // gpus}"
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)


def _speak_when_ended(watchdog: Watchdog) -> None:
    """Has this rank say where all were when its launcher ends it, as torchrun does at once when another one dies.

    The main thread may sit in a collective, where Python runs no handlers: another one waits for the signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reader, 1) != bytes([signal.SIGTERM]):
            pass
        end_process(f"overlap_mtp: ended by the launcher; {watchdog.status}")

    threading.Thread(target=wait, name="overlap_mtp SIGTERM", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
