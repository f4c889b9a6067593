"""What all rollers of one context-parallel group share on a rank: a process group and a side stream."""

from __future__ import annotations

import atexit
import contextlib
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, ExchangeGroup] = weakref.WeakKeyDictionary()
_ALIVE: weakref.WeakSet[ExchangeGroup] = weakref.WeakSet()
_RETIRED: list[dist.ProcessGroup] = []  # of cp groups that are gone


@dataclass
class Traffic:
    """What a rank has sent: messages (one for each peer and exchange) and their bytes."""

    messages: int = 0
    bytes: int = 0

    def add(self, messages: int, num_bytes: int) -> None:
        self.messages += messages
        self.bytes += num_bytes


class ExchangeGroup:
    """A process group for exchanges alone, so that no other traffic delays them, and their side stream.

    The process group is made at first use, by all ranks of `cp_group` together, whatever other groups they are in. It
    is destroyed when the next one is made after `cp_group` is gone.
    """

    def __init__(self, cp_group: dist.ProcessGroup | None) -> None:
        _ALIVE.add(self)
        self.cp_rank = 0 if cp_group is None else cp_group.rank()
        self.cp_size = 1 if cp_group is None else cp_group.size()
        self.device_type = "cpu"
        self._process_group: dist.ProcessGroup | None = None
        self._side_stream: torch.cuda.Stream | None = None
        self.timeout: timedelta | None = None
        self.num_rollers = 0  # that were made for it
        self.num_exchanges = 0  # of activations that were started: all ranks start them in the same order
        self.unfinished: list[Any] = []  # messages of transports that have to be waited for, and their memory
        # By what is carried, why it is not over symmetric memory; "" if it is; nothing if nobody has tried.
        self.why_not_symmetric: dict[str, str] = {}
        if cp_group is not None:
            self._cp_group = weakref.ref(cp_group)
            weakref.finalize(cp_group, self._retire).atexit = False
            self._ranks = dist.get_process_group_ranks(cp_group)
            on_gpu = "nccl" in dist.get_backend_config(cp_group) and torch.cuda.is_available()
            self.device_type = "cuda" if on_gpu else "cpu"
            self.timeout = _timeout_of(cp_group, self.device_type)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group. Its first use is collective over the cp group and waits for all ranks."""
        if self._process_group is None:
            self._process_group = self._make_process_group()
        return self._process_group

    def _make_process_group(self) -> dist.ProcessGroup:
        while _RETIRED:
            retired = _RETIRED.pop()
            if retired in distributed_c10d._world.pg_map:  # it may have gone with the default group
                dist.destroy_process_group(retired)
        cp_group, options = self._cp_group(), None
        if cp_group is None:
            raise RuntimeError("the cp group was destroyed: make rollers for another one")
        if self.device_type == "cuda":
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            if self.timeout is not None:
                options._timeout = self.timeout
        with self.named_errors("making the exchange group"):
            name = [uuid.uuid4().hex]
            dist.broadcast_object_list(name, self._ranks[0], cp_group)
            backend = "nccl" if self.device_type == "cuda" else "gloo"
            return _new_group(self._ranks, f"overlap_mtp {name[0]}", backend, options, self.timeout)

    def _retire(self) -> None:
        """Hand the process group to the next `_make_process_group`. The garbage collector may call this anywhere."""
        if self._process_group is not None:
            _RETIRED.append(self._process_group)
            self._process_group = None

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of overlapped exchanges. There is one for the group, so that exchanges keep their order."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        return self._side_stream

    def global_rank(self, cp_rank: int) -> int:
        return self._ranks[cp_rank]

    @contextlib.contextmanager
    def named_errors(self, what: str) -> Iterator[None]:
        """If torch.distributed gives up, say which exchange it was."""
        try:
            yield
        except RuntimeError as error:
            raise self.named(error, what) from error

    def named(self, error: RuntimeError, what: str) -> RuntimeError:
        """The error with the exchange that it was about."""
        return RuntimeError(
            f"overlap_mtp: {what} failed on cp rank {self.cp_rank} of {self.cp_size}: a peer is missing, late or "
            f"at another exchange ({error})"
        )


def _new_group(
    ranks: list[int], name: str, backend: str, options: Any, timeout: timedelta | None
) -> dist.ProcessGroup:
    """Make a process group of these ranks alone, in their order.

    `dist.new_group` derives the name from how many groups a process is in: ranks that are in different numbers of
    groups never meet, and a group that was destroyed cannot be made again. So this does the same with a given name.
    The calls are private; torch 2.11 and 2.13 have them.
    """
    world = distributed_c10d._world
    _, store = world.pg_map[distributed_c10d._get_default_group()]
    group: dist.ProcessGroup
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        dist.Backend(backend),
        store,
        name,  # type: ignore[arg-type]
        backend_options=options,
        timeout=timeout or distributed_c10d._get_default_timeout(dist.Backend(backend)),
        group_desc="overlap_mtp exchange",
    )
    world.pg_group_ranks[group] = {rank: at for at, rank in enumerate(ranks)}
    return group


@atexit.register
def _release_groups() -> None:
    """Let exchange groups end before the interpreter does: a gloo thread that outlives it aborts the process."""
    for group in list(_ALIVE):
        group._process_group = None


def exchange_group_of(cp_group: dist.ProcessGroup | None) -> ExchangeGroup:
    """The exchange group of a cp group. None stands for a group of one rank.

    Raises:
        ValueError: if it is no process group.
    """
    if cp_group is None:
        return ExchangeGroup(None)
    if not isinstance(cp_group, dist.ProcessGroup):
        got = type(cp_group).__name__
        why = "this rank is not in the group" if isinstance(cp_group, int) else f"got a {got}"
        raise ValueError(f"a group of ranks must be a ProcessGroup (of a DeviceMesh: get_group), but {why}")
    if cp_group not in _GROUPS:
        _GROUPS[cp_group] = ExchangeGroup(cp_group)
    return _GROUPS[cp_group]


def _timeout_of(group: dist.ProcessGroup, device_type: str) -> timedelta | None:
    backend = group._get_backend(torch.device(device_type))
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
