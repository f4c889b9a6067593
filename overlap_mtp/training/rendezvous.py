"""Let the ranks of a run meet at its start, or name those that did not arrive."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from overlap_mtp.training.access import await_listener, listener, set_once

DEADLINE = timedelta(seconds=60)


class PeerError(RuntimeError):
    """Another rank died, failed or did not arrive; the message names the rank and its phase."""


def connect(deadline: timedelta = DEADLINE) -> Store:
    """Return the store that torchrun's environment names, after all ranks have connected to it.

    Raises:
        PeerError: a rank did not arrive within the deadline; the message names it.
    """
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address, end = os.environ["MASTER_ADDR"], time.monotonic() + deadline.total_seconds()
    holds_store = rank == 0 and store_holder() == "rank 0"
    options: dict[str, Any] = {"timeout": deadline, "wait_for_workers": False}
    try:
        if holds_store:
            options["master_listen_fd"] = listener(address, port)
        else:
            await_listener(address, port, end)
        store = _until(end, lambda: TCPStore(address, port, world_size, holds_store, **options))
    except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
        if holds_store:  # for example, the port is taken
            raise
        waited = f"overlap_mtp: rank {rank} of {world_size} waited at the start for {store_holder()}"
        raise PeerError(f"{waited}, which never arrived with the store ({error!r:.300})") from error
    attempt = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    await_ranks(attempt, rank, world_size, timedelta(seconds=end - time.monotonic()))
    return attempt


def await_ranks(store: Store, rank: int, world_size: int, deadline: timedelta = DEADLINE) -> None:
    """Wait until all ranks have called this function.

    The last rank that arrives, or the first that gives up, writes the result into the store. All ranks keep to it,
    no matter how far apart they began to wait.

    Raises:
        PeerError: a rank did not arrive in time, this rank arrived too late, or the store is gone.
    """
    names, result, end = [f"start/{other}" for other in range(world_size)], "start/missing", time.monotonic()
    end += deadline.total_seconds()

    def meet() -> Any:
        store.set(names[rank], "")
        agreed = None
        while agreed is None:
            if not store.check(names):  # otherwise this rank is the last
                with contextlib.suppress(DistStoreError):  # a timeout
                    store.wait([result], 0.9 * timedelta(seconds=end - time.monotonic()))
            missing = (
                [] if store.check(names) else [i for i, name in enumerate(names) if not store.check([name])]
            )
            agreed = set_once(store, result, json.dumps(missing))
        store.set(f"start/told/{rank}", "")
        return json.loads(agreed)

    this = f"overlap_mtp: rank {rank} of {world_size}"
    try:
        missing: list[int] = _until(end, meet)
    except (RuntimeError, TimeoutError) as error:
        lost = f"{store_holder()}, which holds the store, was gone ({error!r:.300})"
        raise PeerError(f"{this} waited at the start until {lost}") from error
    if rank in missing:
        raise PeerError(f"{this} came too late to the start: the others had given up")
    if missing:
        if rank == 0 and store_holder() == "rank 0":  # the others have to read the result from its store
            told = [f"start/told/{other}" for other in range(world_size) if other not in missing]
            with contextlib.suppress(DistStoreError):
                store.wait(told, timedelta(seconds=5))
        absent = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}, which never arrived"
        raise PeerError(f"{this} waited at the start for {absent}")


def store_holder() -> str:
    """Return who holds the store that all ranks use: "the launcher" or "rank 0"."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _until(end: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns. Raise TimeoutError at `end`: torch 2.13 waits for a frozen host for ever."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(max(0.0, end - time.monotonic()))
