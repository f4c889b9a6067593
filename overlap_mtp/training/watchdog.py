"""Watch the ranks of a run: if one dies, fails or stalls, the others stop and name it.

The main thread may be blocked for good: NCCL spins, gloo waits. The store never answers if its host is frozen. So each
rank has two more threads: one exchanges heartbeats through the store, the other judges them and ends the process.
"""

from __future__ import annotations

import itertools
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
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from overlap_mtp.training.access import read_signed, sign
from overlap_mtp.training.rendezvous import DEADLINE, PeerError, store_holder

EXIT_CODE = 70  # of a process that ends because of another rank
RUNNING = ("working", "lost")
# What gloo, NCCL and our exchanges say if they lose a peer.
LOST = re.compile(r"timed? ?out|gave up|gloo|nccl|connection.* (closed|reset|refused)|broken pipe", re.I)


def collectives_begun(group: dist.ProcessGroup) -> Callable[[], int]:
    """Return a function for `Watchdog.follow` that counts the collectives this rank has begun in a group.

    All ranks must begin the same number: use no isend or irecv in the group, since gloo counts them too.
    """
    held = weakref.ref(group)  # a group that is referred to cannot end; torch has no public count
    return lambda: one._get_sequence_number_for_group() if (one := held()) else 0  # type: ignore[attr-defined]


def end_process(message: str) -> NoReturn:
    """Print a message, then end this process and its multiprocessing children, even if its threads are blocked."""
    try:
        print(message, file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(EXIT_CODE)


class Heartbeat(NamedTuple):
    """What a rank last told the others about itself."""

    beat: int
    progress: list[int]  # the number of its phase, and how much it has done of what is followed
    phase: str
    state: str = "working"  # or "lost" (its connection), "failed", "done"
    error: str = ""
    diagnosis: str = ""


class Watchdog:
    """Watch the ranks of a run inside a `with` block. Do nothing in a world of one rank.

        store = connect(deadline)
        with Watchdog(store, rank, world_size, deadline) as watchdog:
            dist.init_process_group(..., store=PrefixStore("groups", store))
            watchdog.follow(collectives_begun(dist.group.WORLD))
            for step in range(steps):
                watchdog.phase(f"step {step}")  # on all ranks, in the same order

    If a rank dies or stalls, every rank ends within the deadline and names that rank and its phase. A rank is gone if
    it sent no heartbeat for a quarter of the deadline. A rank has not arrived if this rank has made more progress (it
    is in a later phase, or has done more in the same phase) and has then stood still for nearly the deadline. If the
    block raises, the others are told. If the exception means a lost connection, the exit waits up to half of the
    deadline for the diagnosis, and then raises PeerError.
    """

    def __init__(self, store: Store, rank: int, world_size: int, deadline: timedelta = DEADLINE) -> None:
        if deadline <= timedelta(0):
            raise ValueError(f"deadline must be > 0 s, got {deadline.total_seconds()} s")
        self.rank, self.world_size, self.deadline_s = rank, world_size, deadline.total_seconds()
        self.interval_s = min(1.0, self.deadline_s / 40)  # between heartbeats
        self.heartbeat_timeout_s = self.deadline_s / 4
        self.progress_timeout_s = self.deadline_s - 6 * self.interval_s  # the rest is for telling the others
        self._store = PrefixStore("watchdog", store)
        self._clock = 0.0  # seconds that this process has watched
        self._phase = (0, "start", 0.0, self.progress_timeout_s)  # number, text, begin, seconds it may take
        self._followed: list[Callable[[], int]] = []
        self._count = (0, 0.0)  # the sum of what is followed, and when it last changed
        self._state = ("working", "")  # and the error
        self._heard = {i: (Heartbeat(-1, [0, 0], "start"), 0.0) for i in range(world_size) if i != rank}
        self._answered, self._store_error = 0.0, ""  # when the store last did, and its error since then
        self._diagnosis = self._message = ""  # what all ranks say, and what this rank adds to it
        self._wake, self._concluded, self._over = (threading.Event() for _ in range(3))
        tasks = (self._talk, self._watch) if world_size > 1 else ()
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]

    def phase(self, text: str, allowed: timedelta = timedelta(0)) -> None:
        """Say what this rank does from now on, for up to `allowed` if that is more than the deadline.

        The others wait so long only while they are in this phase, too: end it with a collective. A thread that holds
        Python's lock (GIL) for longer than a quarter of the deadline lets no heartbeat be sent, whatever is allowed.
        """
        timeout_s = max(self.progress_timeout_s, allowed.total_seconds())
        self._phase = (self._phase[0] + 1, text, self._clock, timeout_s)

    def follow(self, *counts: Callable[[], int]) -> None:
        """Add counters of work that all ranks do equally; in one phase, a lower sum means less progress.

        They are called in another thread. If one raises, all ranks end and name this one.
        """
        self._followed += counts

    @property
    def status(self) -> str:
        """The phase of this rank, and the last known phases of up to eight others, least progress first."""
        heard = sorted((its.progress, other, its.phase, when) for other, (its, when) in self._heard.items())
        late_s = 3 * self.interval_s  # at most: between heartbeats, until one is read, and of the clock
        others = [
            f'rank {other} was in "{phase}" at most {self._clock - when + late_s:.0f} s ago'
            for _, other, phase, when in heard[:8]
        ]
        return ", ".join([f'rank {self.rank} is in "{self._phase[1]}"', *others, *["..."][: len(heard) > 8]])

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        is_done = error is None or (isinstance(error, SystemExit) and not error.code)
        is_lost = self.world_size > 1 and _is_lost_connection(error)
        self._state = ("done" if is_done else "lost" if is_lost else "failed", f"{error!r:.300}")
        self._wake.set()
        if is_lost and not self._concluded.wait(self.heartbeat_timeout_s + 10 * self.interval_s):
            is_lost, self._state = False, ("failed", self._state[1])  # no other rank is to blame
        # Rank 0 may hold the store: it stays until the others are done, or have had time to read how it ended.
        end = time.monotonic() + (self.deadline_s if is_done else 6 * self.interval_s)
        while self.rank == 0 and any(its.state in RUNNING for its, _ in self._heard.values()):
            if time.monotonic() > end or self._concluded.wait(self.interval_s / 2):
                break
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.heartbeat_timeout_s)
        if is_lost:
            raise PeerError(self._message) from error

    def _talk(self) -> None:
        store = None
        for beat in itertools.count(1):
            is_last = self._over.is_set()  # read before the exchange, which then tells how this rank ended
            try:
                store = store or self._store.clone()  # type: ignore[attr-defined]  # a client serves one thread at a time
                self._exchange(store, beat)
                self._answered, self._store_error = self._clock, ""
            except Exception as error:
                self._store_error = f"{error!r:.300}"
                is_last |= isinstance(error, dist.DistNetworkError)  # torch's client does not connect again
            if is_last:
                return
            self._wake.wait(self.interval_s)
            self._wake.clear()

    def _exchange(self, store: Store, beat: int) -> None:
        """Send a heartbeat and read the others': three requests after all have sent one."""
        number, phase, *_ = self._phase
        own = Heartbeat(beat, [number, self._count[0]], phase, *self._state, self._diagnosis)
        store.set(str(self.rank), sign(str(self.rank), json.dumps(own)))
        names = [str(other) for other in self._heard]
        if not store.check(names):
            names = [name for name in names if store.check([name])]
        for name, value in zip(names, store.multi_get(names) if names else [], strict=True):
            text, before = read_signed(name, value), self._heard[int(name)][0].beat
            if text is not None and (its := Heartbeat(*json.loads(text))).beat > before:  # not a stranger's
                self._diagnosis = self._diagnosis or its.diagnosis
                self._heard[int(name)] = (its, self._clock)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._diagnosis and not self._over.wait(self.interval_s):
            now = time.monotonic()
            # If this process was stopped, it did not watch in that time.
            self._clock += min(now - before, self.heartbeat_timeout_s / 2)
            before = now
            self._diagnosis = self._diagnosis or self._add_up() or self._find_gone() or self._find_late()
        if self._diagnosis:
            self._conclude()

    def _add_up(self) -> str:
        """Add up what is followed. Name this rank if that fails: nobody would watch from then on."""
        try:
            count = sum(one() for one in self._followed)
        except Exception as error:
            return f'rank {self.rank} failed in "{self._phase[1]}": a counter that it follows raised {error!r:.300}'
        if count != self._count[0]:
            self._count = (count, self._clock)
        return ""

    def _find_gone(self) -> str:
        """Name a rank that is gone, else one that failed, else the holder of the store if it is gone."""
        for other, (its, when) in self._heard.items():
            # Up to the store's last answer: a silent store says nothing about the others either.
            silent_s = self._answered - when
            limit_s = self.heartbeat_timeout_s if its.beat > 0 else self.progress_timeout_s
            if its.state in RUNNING and silent_s > limit_s:
                return f'rank {other} is gone: no heartbeat for {silent_s:.0f} s, the last in "{its.phase}"'
        for other, (its, _) in self._heard.items():
            if its.state == "failed":
                return f'rank {other} failed in "{its.phase}": {its.error}'
        silent_s, rank_0 = self._clock - self._answered, self._heard[0][0] if self.rank else None
        limit_s = 5 * self.interval_s if self._store_error else self.heartbeat_timeout_s
        # A rank 0 that is done has stayed for the deadline and may have taken the store with it.
        if silent_s <= limit_s or (rank_0 and rank_0.state == "done"):
            return ""
        phase = f', the last heartbeat in "{rank_0.phase}"' if rank_0 and store_holder() == "rank 0" else ""
        silent = f"no answer for {silent_s:.0f} s" + (f" ({self._store_error})" if self._store_error else "")
        return f"{store_holder()}, which holds the store, is gone: {silent}{phase}"

    def _find_late(self) -> str:
        """Name the ranks with the least progress, if this rank has waited too long for them."""
        number, _, begin, timeout_s = self._phase
        working = {other: its for other, (its, _) in self._heard.items() if its.state == "working"}
        least = min((its.progress for its in working.values()), default=[number + 1])
        still_s = self._clock - max(begin, self._count[1])
        # Only ranks that are in this phase may use the time that it allows.
        limit_s = timeout_s if least[0] == number else self.progress_timeout_s
        if self._state[0] not in RUNNING or least >= [number, self._count[0]] or still_s <= limit_s:
            return ""
        late = [str(other) for other, its in working.items() if its.progress == least]
        names = ", ".join(late[:8] + ["..."] * (len(late) > 8))
        who = f"one of ranks {names}" if len(late) > 1 else f"rank {names}"
        return f'{who} has not arrived after {still_s:.0f} s: it is still in "{working[int(late[0])].phase}"'

    def _conclude(self) -> None:
        """Tell the others, so that all say the same. Then end this rank, or let its main thread end it."""
        where = f'rank {self.rank} of {self.world_size} was in "{self._phase[1]}" and ends'
        self._message = f"overlap_mtp: {self._diagnosis}; {where}"
        self._wake.set()
        time.sleep((3 if self.rank == 0 else 1) * self.interval_s)  # rank 0 may hold the store
        self._concluded.set()
        if self._state[0] == "working":
            end_process(self._message)


def _is_lost_connection(error: BaseException | None) -> bool:
    """Return whether an exception, or its cause, is torch's and says that a peer is lost."""
    if error is None or isinstance(error, dist.DistError):
        return error is not None
    is_ours = type(error).__module__.startswith("overlap_mtp.")  # and its message may name any path
    says_lost = isinstance(error, RuntimeError) and not is_ours and LOST.search(str(error))
    return bool(says_lost) or _is_lost_connection(error.__cause__ or error.__context__)
