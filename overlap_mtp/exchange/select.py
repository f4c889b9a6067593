"""How packed tokens move between the ranks of a context-parallel group, and which way is taken."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.plan import PlanShape, plan_shape
from overlap_mtp.exchange.spec import Cargo
from overlap_mtp.exchange.transport import Flight, Traffic, Transport
from overlap_mtp.layout import SequenceLayout

TRANSPORTS = ("auto", "process_group", "symmetric")
__all__ = ["TRANSPORTS", "Flight", "Traffic", "Transport", "open_transport", "shapes_of"]

Made = TypeVar("Made")
_log = logging.getLogger("overlap_mtp")


def shapes_of(layout: SequenceLayout, num_depths: int, max_documents: int) -> list[PlanShape]:
    """The plans' shapes of all ranks."""
    return [plan_shape(layout, rank, num_depths, max_documents) for rank in range(layout.cp_size)]


def open_transport(
    name: str,
    group: ExchangeGroup,
    shapes: list[PlanShape],
    cargo: Cargo,
    traffic: Traffic,
    overlapped: bool,
    length: int,
) -> Transport:
    """The transport of that name for exchanges of `cargo`, at first of `length` tokens a rank. Collective.

    "auto": symmetric memory where all ranks can share it, else the process group. Raises ValueError, on all ranks,
    where "symmetric" is asked for and one of them cannot.
    """
    shape = shapes[group.cp_rank]
    if cargo.device.type == "cpu":
        from overlap_mtp.exchange.gloo import HostTransport

        if name == "symmetric":
            raise ValueError("transport symmetric needs GPUs that share memory, the batch is on the CPU")
        return HostTransport(group, shape, cargo, traffic, overlapped)

    # Triton is compiled for a GPU only.
    from overlap_mtp.exchange.cuda import free_left
    from overlap_mtp.exchange.nccl import ProcessGroupTransport
    from overlap_mtp.exchange.symmetric import SymmetricTransport, allocate

    free_left()  # here, where a wait holds up no step, and before more is allocated
    if name == "process_group" or group.cp_size == 1:
        return ProcessGroupTransport(group, shape, cargo, traffic, overlapped, length)
    transport: Transport | None = None
    reason = _why_not_shared(group)
    if not reason:
        # Two steps, because the second waits for ranks that the first has stopped.
        memory, reason = _made_together(lambda: allocate(shapes, cargo), group)
    if not reason:
        assert memory is not None
        shared = memory
        transport, reason = _made_together(
            lambda: SymmetricTransport(group, shapes, cargo, traffic, overlapped, length, shared), group
        )
    if name == "symmetric" and reason:
        raise ValueError(f"transport symmetric does not work here: {reason}")
    if group.cp_rank == 0 and group.why_not_symmetric is None:
        _log.info(
            "overlap_mtp: transport %s for a cp group of %d: %s",
            "process_group" if reason else "symmetric",
            group.cp_size,
            reason or "all ranks can write to each other's memory",
        )
    group.why_not_symmetric = reason
    return transport or ProcessGroupTransport(group, shape, cargo, traffic, overlapped, length)


def _why_not_shared(group: ExchangeGroup) -> str:
    """Why the ranks cannot share memory, as far as that is known without trying; "" where it is worth a try.

    Collective, and alike on all ranks.
    """
    if group.why_not_symmetric:
        return group.why_not_symmetric
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{os.uname().nodename} {boot.read_text() if boot.exists() else ''}"
    mine = (hashlib.sha256(host.encode()).hexdigest(), os.environ.get("NCCL_P2P_DISABLE", "0") == "1")
    everyone: list[tuple[str, bool]] = [mine] * group.cp_size
    with group.named_errors("choosing a transport"):
        dist.all_gather_object(everyone, mine, group=group.group)
    if len({host for host, _ in everyone}) > 1:
        return "the ranks are on several hosts"
    return "NCCL_P2P_DISABLE is set" if any(disabled for _, disabled in everyone) else ""


def _made_together(make: Callable[[], Made], group: ExchangeGroup) -> tuple[Made | None, str]:
    """(what was made, "") where all ranks could make theirs, else (None, what kept one from it). Collective."""
    made, error = None, ""
    try:
        made = make()
    except Exception as failure:  # whatever it was, the process group is left
        error = f"cp rank {group.cp_rank}: {type(failure).__name__}: {failure}"
    errors = [error] * group.cp_size
    with group.named_errors("choosing a transport"):
        dist.all_gather_object(errors, error, group=group.group)
    failures = "; ".join(one for one in errors if one)
    return (None, failures) if failures else (made, "")
