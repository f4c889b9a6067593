"""When the boundary exchange happens: six schedules behind one interface."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist

from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.exchange.spec import roll_options
from overlap_mtp.schedules.packed import PACKED_SCHEDULES, PackedRoller
from overlap_mtp.schedules.prepared import PreparedRoller
from overlap_mtp.schedules.roller import Roller, RollerConfig, Rolls
from overlap_mtp.schedules.sync import SyncRoller
from overlap_mtp.tensors import IGNORE_INDEX

_ROLLERS: dict[str, type[Roller]] = {
    "sync": SyncRoller,
    **dict.fromkeys(PACKED_SCHEDULES, PackedRoller),
    "prepared": PreparedRoller,
    "none": PreparedRoller,
}
SCHEDULES = tuple(name for name in _ROLLERS if name != "none")

__all__ = ["SCHEDULES", "Roller", "Rolls", "make_roller"]


def make_roller(
    schedule: str,
    cp_group: dist.ProcessGroup | None,
    num_depths: int,
    transport: str = "auto",
    max_documents: int = 128,
    ignore_index: int = IGNORE_INDEX,
    check_layouts: bool | None = None,
    fills: Mapping[str, float] | None = None,
    depths: Mapping[str, int] | None = None,
) -> Roller:
    """Make a roller. It communicates nothing: that begins with the first `start`.

    Args:
        schedule: "sync", "merged", "batched", "overlap", "prefetch" or "prepared" ("none" skips the rolls, for timing
            only).
        cp_group: the ranks that share a sequence; None for one rank that holds everything.
        num_depths: how many depths `at` will be asked for.
        transport: of merged, batched, overlap and prefetch: "process_group" (NCCL or gloo), "symmetric" (GPUs that
            share memory, with atomics between them), or "auto" for the fastest that all ranks can use. Links over PCIe
            may lack atomics, which "auto" cannot tell: ask for "process_group" there.
        max_documents: the most documents of a packed batch. It sizes the messages: about 16 * num_depths bytes for a
            tensor and document. Empty documents at the end do not count. Those of a DeviceLayout do, and so does one
            more for a tail.
        ignore_index: what rolled `labels` hold past the end of a document: the label that your loss ignores. Rolled
            `padding_mask` holds 1 (True) there, all other tensors hold 0.
        check_layouts: of sync: compare each microbatch and its layout over the ranks at `start` and before each roll,
            by a small message that waits for the device. The other schedules always compare, at no cost. Default:
            whether the environment variable OVERLAP_MTP_CHECK_LAYOUTS is 1.
        fills: what other rolled tensors hold past the end of a document, by name. It comes before the defaults above.
        depths: of tensors that are rolled less far than num_depths, by name.

    Returns:
        The roller.

    Raises:
        ValueError: if the schedule or transport is unknown, or a size is below 1.
    """
    if schedule not in _ROLLERS:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    options = roll_options(num_depths, max_documents, ignore_index, fills, depths)
    if check_layouts is None:
        check_layouts = os.environ.get("OVERLAP_MTP_CHECK_LAYOUTS") == "1"
    config = RollerConfig(
        schedule,
        exchange_group_of(cp_group),
        transport if schedule in PACKED_SCHEDULES else "",
        options,
        ignore_index,
        check_layouts and schedule == "sync",
    )
    return _ROLLERS[schedule](config)
