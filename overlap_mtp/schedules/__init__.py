"""Five answers to the question when the boundary exchange happens, behind one interface."""

from __future__ import annotations

import torch.distributed as dist

from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.schedules.merged import MergedRoller
from overlap_mtp.schedules.none import NoneRoller
from overlap_mtp.schedules.overlap import OverlapRoller
from overlap_mtp.schedules.packed import WiredRoller
from overlap_mtp.schedules.prefetch import PrefetchRoller
from overlap_mtp.schedules.prepared import PreparedRoller
from overlap_mtp.schedules.roller import Roller, Rolls
from overlap_mtp.schedules.sync import SyncRoller

_WIRED: dict[str, type[WiredRoller]] = {
    "merged": MergedRoller,
    "overlap": OverlapRoller,
    "prefetch": PrefetchRoller,
}
_OTHERS: dict[str, type[SyncRoller | PreparedRoller | NoneRoller]] = {
    "sync": SyncRoller,
    "prepared": PreparedRoller,
    "none": NoneRoller,
}
SCHEDULES = ("sync", *_WIRED, "prepared")

__all__ = ["SCHEDULES", "Roller", "Rolls", "make_roller"]


def make_roller(
    schedule: str,
    cp_group: dist.ProcessGroup | None,
    num_depths: int,
    transport: str = "auto",
    max_documents: int = 128,
) -> Roller:
    """A roller for the ranks of `cp_group` (None: one rank that holds everything).

    `schedule`: "sync", "merged", "overlap", "prefetch" or "prepared" ("none" skips the rolls, for timing only).
    `num_depths`: how many depths `at` will be asked for. `transport` of merged, overlap and prefetch:
    "process_group" (NCCL or gloo), "symmetric" (GPUs that share memory), or "auto" for the fastest that all ranks
    can use. `max_documents`: the most documents of a packed batch; it sizes the messages
    (about 16 * num_depths bytes a tensor and document). Communicates nothing: that begins with the first
    `start`. Raises ValueError for an unknown schedule or transport and for sizes below 1.
    """
    if schedule not in (*_WIRED, *_OTHERS):
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if num_depths < 1:
        raise ValueError(f"num_depths must be >= 1, got {num_depths}")
    if max_documents < 1:
        raise ValueError(f"max_documents must be >= 1, got {max_documents}")
    group = exchange_group_of(cp_group)
    if schedule in _WIRED:
        return _WIRED[schedule](group, num_depths, max_documents, transport)
    return _OTHERS[schedule](group, num_depths, max_documents)
