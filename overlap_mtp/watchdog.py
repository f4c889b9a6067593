"""Ranks that look after one another: one that dies, fails or never arrives ends the others, which say who it was.

Every rank has a thread that writes down, every second or so, that it lives and which phase it has reached, and reads
what the others wrote. The main thread may meanwhile sit in a collective that never returns (NCCL spins, gloo waits),
so that it is the thread that ends the process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

POLL_S = 0.05
EXIT_CODE = 70  # of a process that ends for another rank's sake
DEADLINE = timedelta(seconds=60)
LOST = re.compile(r"connection|gloo|nccl|broken pipe|timed? ?out|socket|peer|rank \d+", re.IGNORECASE)


class PeerError(RuntimeError):
    """Another rank is gone, has failed or has not arrived; the message says which, and where it was."""


def connect(deadline: timedelta = DEADLINE) -> Store:
    """The store of torchrun's environment, once all ranks have come to it. Raises PeerError naming those that have not.

    For `dist.init_process_group(backend, store=PrefixStore("groups", store), ...)` and for a Watchdog.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(
            address, port, world_size, rank == 0 and not agents, timeout=deadline, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        who = "the launcher" if agents else "rank 0"
        raise PeerError(
            f"overlap_mtp: rank {rank} found no store, which {who} holds: {_line(error)}"
        ) from error
    attempt = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    await_ranks(attempt, rank, world_size, deadline)
    return attempt


def await_ranks(store: Store, rank: int, world_size: int, deadline: timedelta = DEADLINE) -> None:
    """Waits until all ranks have called it. Raises PeerError naming those that have not within the deadline."""
    end = time.monotonic() + deadline.total_seconds()
    missing, lost = list(range(world_size)), ""
    try:
        store.set(f"arrived/{rank}", "")
        while missing and time.monotonic() < end:
            missing = [other for other in missing if not store.check([f"arrived/{other}"])]
            time.sleep(POLL_S if missing else 0)
    except RuntimeError as error:
        lost = f" (and the store that rank 0 holds is gone: {_line(error)})"
    if missing:
        if rank == 0:
            time.sleep(10 * POLL_S)  # it may hold the store: the others find the same
        who = ", ".join(str(one) for one in missing)
        raise PeerError(
            f"overlap_mtp: rank {rank} of {world_size} waited up to {deadline.total_seconds():.0f} s at the start for "
            f"rank{'s' if len(missing) > 1 else ''} {who}, which never arrived{lost}"
        )


@dataclass
class Sign:
    """What a rank says of itself."""

    beat: int
    number: int  # of its phase: all ranks go through the same ones
    phase: str
    state: str = "at work"  # or "done", "lost" (its connection), "failed"
    error: str = ""


def end_process(message: str) -> NoReturn:
    """Ends this process, whatever its other threads do. torchrun and spawn() then end what is left of the run."""
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Watchdog:
    """Looks after the ranks of a run while it is entered.

        store = connect(deadline)
        with Watchdog(store, rank, world_size, deadline) as watchdog:
            dist.init_process_group(..., store=PrefixStore("groups", store))
            for step in range(steps):
                watchdog.phase(f"step {step}")   # on all ranks, in the same order
                ...

    A rank is gone when nothing was heard of it for a quarter of the deadline (at least ten intervals); it has not
    arrived when others have been in a later phase for nearly the deadline. An exception of this rank's own is told the
    others. One that means a lost connection waits, at most for as long as it takes to find out, for who it was: then
    PeerError is raised from it. Clocks of different hosts are never compared.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        deadline: timedelta = DEADLINE,
        interval_s: float = 1.0,
        on_verdict: Callable[[str], Any] = end_process,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.deadline_s = deadline.total_seconds()
        self.interval_s = min(interval_s, self.deadline_s / 20)
        self.silence_s = min(max(10 * self.interval_s, self.deadline_s / 4), self.deadline_s)
        self._store = PrefixStore("watchdog", store)
        self._on_verdict = on_verdict
        self._sign = Sign(0, 0, "start")
        self._since = time.monotonic()  # in this phase
        self._heard: dict[
            int, tuple[Sign, float]
        ] = {}  # the last new sign of each other rank, and when it came
        self._verdict: str | None = None
        self._left = float("inf")  # when this rank was done, or lost its connection
        self._stop = False
        self._wake = threading.Event()
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="overlap_mtp watchdog", daemon=True)

    def phase(self, text: str) -> None:
        """Says what this rank does from now on. Costs less than 2 µs."""
        sign = self._sign
        self._sign = Sign(sign.beat, sign.number + 1, text)
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.world_size > 1:
            now = time.monotonic()
            self._heard = {
                other: (Sign(-1, 0, "start"), now) for other in range(self.world_size) if other != self.rank
            }
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world_size == 1:
            return
        self._left = time.monotonic()
        state = "done" if error is None else "lost" if _is_loss(error) else "failed"
        sign = self._sign
        self._sign = Sign(sign.beat, sign.number, sign.phase, state, "" if error is None else _line(error))
        self._wake.set()
        if state == "lost":
            self._found.wait(self.silence_s + 10 * self.interval_s)
        elif self.rank == 0:
            self._let_others_read(state)
        self._stop = True
        self._wake.set()
        self._thread.join(timeout=self.deadline_s)
        if state == "lost" and self._verdict:
            if self.rank == 0:
                time.sleep(3 * self.interval_s)  # it may hold the store
            raise PeerError(self._verdict) from error

    def _let_others_read(self, state: str) -> None:
        """Rank 0 may hold the store: it stays until the others are done, or have had the time to read of its end."""
        end = time.monotonic() + (self.deadline_s if state == "done" else 5 * self.interval_s)
        while time.monotonic() < end:
            if all(sign.state != "at work" for sign, _ in self._heard.values()) or self._verdict:
                return
            time.sleep(self.interval_s / 2)

    def _watch(self) -> None:
        store, failures = _own_connection(self._store), 0
        while True:
            try:
                self._exchange(store)
                failures = 0
            except Exception as error:
                failures += 1
                if failures > 5:
                    self._end(f"rank 0, which holds the store, is gone ({_line(error)})")
            if self._stop:
                return
            if not failures and (what := self._judge()):
                self._end(what, store)
            self._wake.wait(self.interval_s)
            self._wake.clear()

    def _exchange(self, store: Store) -> None:
        sign = self._sign
        sign.beat += 1
        store.set(str(self.rank), json.dumps(vars(sign)))
        now = time.monotonic()
        if store.check(["verdict"]):
            self._end(store.get("verdict").decode())
        for other, (last, _) in self._heard.items():
            if store.check([str(other)]):
                heard = Sign(**json.loads(store.get(str(other))))
                if heard.beat != last.beat:
                    self._heard[other] = (heard, now)

    def _judge(self) -> str | None:
        """Who is to blame, if anybody: who is gone, before who failed, before who is late."""
        now, sign = time.monotonic(), self._sign
        working = {other: both for other, both in self._heard.items() if both[0].state in ("at work", "lost")}
        for other, (heard, when) in working.items():
            if now - when > self.silence_s and heard.state == "at work":
                return f'rank {other} is gone: no sign of it for {now - when:.0f} s, the last was in "{heard.phase}"'
        for other, (heard, _) in self._heard.items():
            if heard.state == "failed":
                return f'rank {other} failed in "{heard.phase}": {heard.error}'
        patience = self.deadline_s - 2 * self.interval_s
        for other, (heard, _) in working.items():
            late = heard.number < sign.number and now - self._since > patience
            # A collective of this rank's was given up, and the other, who lives, noticed nothing: it never came to it.
            absent = sign.state == "lost" and heard.state == "at work" and now - self._left > self.silence_s
            if (late and sign.state == "at work") or absent:
                return f'rank {other} has not arrived after {now - self._since:.0f} s: it is still in "{heard.phase}"'
        return None

    def _end(self, what: str, store: Store | None = None) -> None:
        """Ends this rank, or tells its main thread why; with a `store` all others too, so that they say the same."""
        if self._verdict is not None:
            return
        self._verdict = (
            f'overlap_mtp: {what}; rank {self.rank} of {self.world_size} was in "{self._sign.phase}" and ends'
        )
        if store is not None:
            store.set("verdict", what)
            if self.rank == 0:
                time.sleep(3 * self.interval_s)  # it may hold the store
        self._found.set()
        if time.monotonic() < self._left:
            self._on_verdict(self._verdict)


def _own_connection(store: Store) -> Store:
    """Another client of the same store: one that waits keeps the rest of its process from using it."""
    return store.clone() if hasattr(store, "clone") else store


def _is_loss(error: BaseException) -> bool:
    """Whether an exception says that another rank could not be reached, rather than what this rank did wrong."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or (isinstance(seen, RuntimeError) and LOST.search(str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}".rstrip(": ")
