"""Ranks that meet at the start of a run, or say who has not come."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

T = TypeVar("T")
DEADLINE = timedelta(seconds=60)
POLL_S = 0.05
STAY_S = 5.0  # at most, of the store's holder, for the others to hear that it gave up


class PeerError(RuntimeError):
    """Another rank is gone, has failed or has not arrived; the message says which, and where it was."""


def connect(deadline: timedelta = DEADLINE) -> Store:
    """The store of torchrun's environment, once all ranks have come to it. Raises PeerError naming who has not.

    For `dist.init_process_group(backend, store=PrefixStore("groups", store), ...)` and for a Watchdog.
    """
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    is_holder, begin = rank == 0 and store_holder() == "rank 0", time.monotonic()
    address, left = os.environ["MASTER_ADDR"], deadline
    try:
        if not is_holder:
            left -= _await_port(address, port, deadline)
        where = (address, port, world_size, is_holder)
        store = _within(left, lambda: TCPStore(*where, timeout=deadline, wait_for_workers=False))
    except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
        if is_holder:  # its port is taken, say
            raise
        raise PeerError(
            f"overlap_mtp: rank {rank} of {world_size} waited {time.monotonic() - begin:.0f} s at the start for "
            f"{store_holder()}, which never arrived with the store ({line_of(error)})"
        ) from error
    attempt = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    await_ranks(attempt, rank, world_size, deadline - timedelta(seconds=time.monotonic() - begin))
    return attempt


def await_ranks(store: Store, rank: int, world_size: int, deadline: timedelta = DEADLINE) -> None:
    """Waits until all ranks have called it. Raises PeerError naming who has not in time.

    The first rank that found all of them, or gave up, writes its verdict into the store and all keep to it, however
    far apart they began to wait.
    """
    missing, lost = [other for other in range(world_size) if other != rank], ""
    begin = time.monotonic()
    end = begin + 0.95 * deadline.total_seconds()

    def arrive() -> None:
        store.set(f"start/{rank}", "")
        while missing and time.monotonic() < end:  # for one at a time, which is few requests
            if store.check([f"start/{missing[0]}"]):
                missing.pop(0)
            elif store.check(["start/verdict"]):
                break
            else:
                time.sleep(POLL_S)
        absent = [other for other in missing if not store.check([f"start/{other}"])]
        verdict = store.compare_set("start/verdict", "", " ".join(map(str, absent)) or "none")
        missing[:] = [] if verdict == b"none" else map(int, verdict.split())
        if missing:
            store.add("start/told", 1)

    try:
        _within(deadline, arrive)
    except (RuntimeError, TimeoutError) as error:
        lost = f" (others may be missing: {store_holder()}, which holds the store, is gone: {line_of(error)})"
        del missing[1:]
    waited = f"overlap_mtp: rank {rank} of {world_size} waited {time.monotonic() - begin:.0f} s at the start"
    if rank in missing:
        raise PeerError(f"{waited}, but the others had given up: it came too late")
    if missing:
        if rank == 0 and store_holder() == "rank 0":  # the others are to read it from its store
            stay_until = time.monotonic() + STAY_S
            while store.add("start/told", 0) < world_size - len(missing) and time.monotonic() < stay_until:
                time.sleep(POLL_S)
        raise PeerError(
            f"{waited} for rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}, which never arrived{lost}"
        )


def store_holder() -> str:
    """Who holds the store that all ranks talk by."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _await_port(address: str, port: int, limit: timedelta) -> timedelta:
    """How long it took until something listened there. OSError where nothing does.

    torch's client would try for up to three times its timeout, and no thread may be left in it when Python ends.
    """
    begin, limit_s = time.monotonic(), limit.total_seconds()
    while True:
        passed_s = time.monotonic() - begin
        try:
            socket.create_connection((address, port), max(POLL_S, limit_s - passed_s)).close()
            return timedelta(seconds=passed_s)
        except OSError:
            if passed_s > limit_s:
                raise
            time.sleep(POLL_S)


def _within(limit: timedelta, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError where it takes longer.

    A store whose host is frozen never answers, and connects without end, whatever its timeout (torch 2.13).
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(max(0.0, limit.total_seconds()))


def line_of(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}".rstrip(": ")
