"""Ranks that look after one another: one that dies, fails or never arrives ends the others, which say who it was.

The main thread may sit in a collective that never returns (NCCL spins, gloo waits), and the store may never answer
(its host is frozen, or out of reach). So a rank has two threads: one tells the others by way of the store how far this
rank is and reads how far they are, the other judges what it read, by this host's clock, and ends the process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from overlap_mtp.training.rendezvous import DEADLINE, PeerError, line_of, store_holder

EXIT_CODE = 70  # of a process that ends for another rank's sake
# What gloo, NCCL and our exchanges say of a peer that did not come, and of one that could not be reached either.
LATE = re.compile(r"timed? ?out|gave up waiting", re.I)
LOST = re.compile(rf"{LATE.pattern}|gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.I)


def collectives_begun(group: dist.ProcessGroup) -> Callable[[], int]:
    """How many this rank has begun in a group, for `Watchdog.follow`. On NCCL it is the host's calls that count.

    For groups in which all ranks begin as many: without isend and irecv, which gloo counts too.
    """
    reference = weakref.ref(group)  # who holds a group keeps it from ending

    def count() -> int:
        group = reference()
        return 0 if group is None else group._get_sequence_number_for_group()  # type: ignore[attr-defined]

    return count


def end_process(message: str) -> NoReturn:
    """Ends this process and what it started by multiprocessing, whatever its other threads do."""
    try:
        print(message, file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(EXIT_CODE)


class Sign(NamedTuple):
    """What a rank says of itself."""

    beat: int
    number: int  # of its phase: all ranks go through the same ones
    phase: str
    progress: int = 0  # within the phase: the count of what is followed
    state: str = "at work"  # or "lost" (its connection), "failed", "done"
    error: str = ""

    @property
    def is_running(self) -> bool:
        return self.state in ("at work", "lost")

    @property
    def place(self) -> tuple[int, int]:
        """How far it is."""
        return self.number, self.progress


class Watchdog:
    """Looks after the ranks of a run while it is entered, once. Does nothing in a world of one.

        store = connect(deadline)
        with Watchdog(store, rank, world_size, deadline) as watchdog:
            dist.init_process_group(..., store=PrefixStore("groups", store))
            watchdog.follow(collectives_begun(dist.group.WORLD))
            for step in range(steps):
                watchdog.phase(f"step {step}")   # on all ranks, in the same order
                ...

    A rank is gone when nothing was heard of it for a quarter of the deadline; it has not arrived when this rank has
    been further, and stood still, for nearly the deadline: in a later phase, or in the same one with a higher count of
    what is followed. This process then ends by `on_verdict`, in the watchdog's thread: by default with one line on
    stderr and EXIT_CODE. An exception of this rank is told the others. If it means a lost connection, leaving waits
    until it is known for whom (half of the deadline at most) and raises PeerError from it; only where all others live
    is this rank itself to blame. Clocks of different hosts are never compared.
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
        if self.deadline_s <= 0 or interval_s <= 0:
            raise ValueError(
                f"deadline and interval_s must be > 0 s, got {self.deadline_s} and {interval_s} s"
            )
        self.interval_s = min(interval_s, self.deadline_s / 40)
        self.silence_s = self.deadline_s / 4
        self.patience_s = self.deadline_s - 6 * self.interval_s  # what is left is for telling the others
        self._store, self._on_verdict = PrefixStore("watchdog", store), on_verdict
        self._clock = 0.0  # seconds that this process has watched
        # The phase's number, its text, when it began, and how long others may take to arrive in it.
        self._at = (0, "start", 0.0, self.patience_s)
        self._followed: list[Callable[[], int]] = []
        self._count = (0, 0.0)  # of all that is followed, since when
        self._state = ("at work", "")  # and the error
        self._gave_up = float("inf")  # when a collective was
        self._heard = {other: (Sign(-1, 0, "start"), 0.0) for other in range(world_size) if other != rank}
        self._answered, self._trouble = 0.0, ""  # when the store last did, and what came instead since
        self._what = ""  # is the matter, found here or by another rank
        self._verdict = ""
        self._wake, self._told, self._found, self._over = (threading.Event() for _ in range(4))
        self._is_closing = False
        self._talker = threading.Thread(target=self._talk, name="overlap_mtp signs", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="overlap_mtp watchdog", daemon=True)

    def phase(self, text: str, allowed: timedelta = timedelta(0)) -> None:
        """Says what this rank does from now on. Less than 1 µs.

        `allowed`: how long a rank may rightly keep the others waiting in it, where that is more than the deadline.
        """
        patience_s = max(self.patience_s, allowed.total_seconds())
        self._at = (self._at[0] + 1, text, self._clock, patience_s)

    def follow(self, *counts: Callable[[], int]) -> None:
        """Adds counts of what all ranks do alike: who is behind within a phase is the rank that has done least.

        They are asked for in other threads, now and every `interval_s`. All ranks call this at the same place.
        """
        self._followed += counts
        self._count = (self._total(), self._clock)

    def _total(self) -> int:
        return sum(count() for count in self._followed)

    @property
    def whereabouts(self) -> str:
        """Where this rank is, and where others were when they were last heard of: the furthest behind first."""
        heard = sorted((sign.place, other, sign.phase) for other, (sign, _) in self._heard.items())
        others = [f'rank {other} in "{phase}"' for _, other, phase in heard[:8]]
        said = (
            f", {', '.join(others)}{', ...' if len(heard) > 8 else ''} when last heard of" if others else ""
        )
        return f'rank {self.rank} was in "{self._at[1]}"{said}'

    def __enter__(self) -> Watchdog:
        if self.world_size > 1:
            self._talker.start()
            self._judge.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world_size == 1:
            return
        is_lost = error is not None and _says(error, LOST)
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._state = ("done", "")
        else:
            self._gave_up = self._clock if _says(error, LATE) else self._gave_up
            self._state = ("lost" if is_lost else "failed", line_of(error))
        self._wake.set()
        if is_lost and not self._found.wait(self.silence_s + 10 * self.interval_s):
            is_lost, self._state = False, ("failed", self._state[1])
        if self.rank == 0:
            self._let_others_read()
        self._is_closing = True
        self._wake.set()
        self._talker.join(self.silence_s)
        self._over.set()
        if is_lost:
            raise PeerError(self._verdict) from error

    def _let_others_read(self) -> None:
        """Rank 0 may hold the store: it stays until the others are done too, or have had the time to read its end."""
        is_done = self._state[0] == "done"
        end = time.monotonic() + (self.deadline_s if is_done else 6 * self.interval_s)
        while time.monotonic() < end and any(sign.is_running for sign, _ in self._heard.values()):
            if self._found.wait(self.interval_s / 2):
                return

    def _talk(self) -> None:
        store, beat = None, 0
        while True:
            is_last = self._is_closing  # read first: what is sent after that says how this rank ended
            try:
                store = store or _own_connection(self._store)
                beat += 1
                self._exchange(store, beat)
                self._answered, self._trouble = self._clock, ""
            except Exception as error:
                self._trouble = line_of(error)
                is_last |= isinstance(error, dist.DistNetworkError)  # torch's client does not connect again
            if is_last:
                return
            self._wake.wait(self.interval_s)
            self._wake.clear()

    def _exchange(self, store: Store, beat: int) -> None:
        """Tells and reads: three requests once all have been heard of."""
        number, phase, *_ = self._at
        store.set(str(self.rank), json.dumps((beat, number, phase, self._count[0], *self._state)))
        if self._what and not self._told.is_set():
            store.set("verdict", self._what)
        if store.check(["verdict"]):
            self._what = self._what or store.get("verdict").decode()
            self._told.set()
        names = [str(other) for other in self._heard]
        if not store.check(names):
            names = [name for name in names if store.check([name])]
        for name, value in zip(names, store.multi_get(names) if names else [], strict=True):
            sign = Sign(*json.loads(value))
            if sign.beat != self._heard[int(name)][0].beat:
                self._heard[int(name)] = (sign, self._clock)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.interval_s):
            now = time.monotonic()
            self._clock += min(now - before, self.silence_s / 2)  # a process that was stopped has not watched
            before = now
            if (count := self._total()) != self._count[0]:
                self._count = (count, self._clock)
            self._what = self._what or self._find()
            if self._what:
                self._conclude(self._what)
                return

    def _find(self) -> str:
        """What is the matter, if anything: who is gone, before who failed, before who is late."""
        state, (number, _, since, patience_s), (count, last) = self._state[0], self._at, self._count
        still_s = self._clock - max(since, last)
        for other, (sign, when) in self._heard.items():
            # As of the last answer: a store that says nothing says nothing of the others either.
            silent_s, limit_s = self._answered - when, self.silence_s if sign.beat > 0 else self.patience_s
            if sign.is_running and silent_s > limit_s:
                return f'rank {other} is gone: no sign of it for {silent_s:.0f} s, the last was in "{sign.phase}"'
        for other, (sign, _) in self._heard.items():
            if sign.state == "failed":
                return f'rank {other} failed in "{sign.phase}": {sign.error}'
        silent_s = self._clock - self._answered
        if (
            silent_s > (5 * self.interval_s if self._trouble else self.silence_s)
            and not self._may_be_closed()
        ):
            return self._of_store(silent_s)
        # The furthest behind: those between wait for them as well.
        working = {other: sign for other, (sign, _) in self._heard.items() if sign.state == "at work"}
        behind = min((sign.place for sign in working.values()), default=(number + 1, 0))
        is_late = (
            state == "at work"
            and behind < (number, count)
            # A phase that may take longer is for those that are in it.
            and still_s > (patience_s if behind[0] == number else self.patience_s)
        )
        # A collective was given up, and the others live and noticed nothing: they never came to it.
        gave_up_s = self._clock - self._gave_up
        is_absent = (
            state == "lost" and behind[0] <= number and gave_up_s > self.silence_s + 2 * self.interval_s
        )
        if is_late or is_absent:
            return _of_late(
                [(other, sign) for other, sign in working.items() if sign.place == behind], still_s
            )
        return ""

    def _of_store(self, silent_s: float) -> str:
        what = f"{store_holder()}, which holds the store, is gone: no answer for {silent_s:.0f} s"
        what += f" ({self._trouble})" if self._trouble else ""
        is_rank = store_holder() == "rank 0" and self.rank != 0
        return what + (f', the last sign was in "{self._heard[0][0].phase}"' if is_rank else "")

    def _may_be_closed(self) -> bool:
        """Whether rank 0 is done: it stayed for the deadline, and may have taken the store along."""
        return self.rank != 0 and self._heard[0][0].state == "done"

    def _conclude(self, what: str) -> None:
        """Tells the others, so that all say the same; then ends this rank, or lets its main thread know."""
        self._verdict = (
            f'overlap_mtp: {what}; rank {self.rank} of {self.world_size} was in "{self._at[1]}" and ends'
        )
        self._wake.set()
        self._told.wait(2 * self.interval_s)
        if self.rank == 0:
            time.sleep(3 * self.interval_s)  # it may hold the store
        self._found.set()
        if self._state[0] == "at work":
            self._on_verdict(self._verdict)


def _of_late(signs: list[tuple[int, Sign]], still_s: float) -> str:
    """Of ranks that are equally far: which of them the others wait for is not known."""
    names, phase = [str(other) for other, _ in signs], signs[0][1].phase
    if len(names) == 1:
        return f'rank {names[0]} has not arrived after {still_s:.0f} s: it is still in "{phase}"'
    more = [f"{len(names) - 8} more"] if len(names) > 8 else []
    return (
        f'of ranks {", ".join(names[:8] + more)}, all in "{phase}", one has not arrived after {still_s:.0f} s'
    )


def _own_connection(store: Store) -> Store:
    """Another client of the same store: one that waits keeps the rest of its process from using it."""
    return store.clone() if hasattr(store, "clone") else store


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    """Whether an exception, or one that it came from, is torch's or ours of another rank and says such a thing."""
    seen: BaseException | None = error
    while seen is not None:
        is_of_torch = isinstance(seen, dist.DistError) and words is LOST
        is_plain = isinstance(seen, RuntimeError) and not type(seen).__module__.startswith("overlap_mtp.")
        if is_of_torch or (is_plain and words.search(str(seen))):  # a class of ours may name any path
            return True
        seen = seen.__cause__ or seen.__context__
    return False
