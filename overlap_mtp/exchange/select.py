"""Which transport an exchange takes. All ranks of a group decide it together."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup, Traffic
from overlap_mtp.exchange.plan import ExchangePlan
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.transport import Transport

TRANSPORTS = ("auto", "process_group", "symmetric")

Made = TypeVar("Made")
_log = logging.getLogger("overlap_mtp")


def make_transport(
    group: ExchangeGroup,
    plans: list[ExchangePlan],
    spec: ExchangeSpec,
    traffic: Traffic,
    is_overlapped: bool,
    local_len: int,
) -> Transport:
    """Make the transport that `spec.transport` asks for. Collective over the group.

    "auto" means symmetric memory if all ranks can share it, and otherwise the process group.

    Args:
        group: that carries the exchanges.
        plans: of all ranks, in rank order.
        spec: of the batches.
        traffic: counts what is sent.
        is_overlapped: send on the side stream.
        local_len: tokens a rank of the first batch.

    Returns:
        The transport.

    Raises:
        ValueError: on all ranks, if "symmetric" is asked for and one of them cannot.
    """
    name, plan = spec.transport, plans[group.cp_rank]
    if spec.device.type == "cpu":
        from overlap_mtp.exchange.gloo import GlooTransport

        if name == "symmetric":
            raise ValueError("transport symmetric needs GPUs that share memory, the batch is on the CPU")
        return GlooTransport(group, plan, spec, traffic)

    # Imported only here: Triton compiles for a GPU.
    from overlap_mtp.exchange.cuda import free_orphans
    from overlap_mtp.exchange.nccl import NcclTransport

    free_orphans()  # here, because a wait delays no step, and before more is allocated
    if name == "process_group" or group.cp_size == 1:
        return NcclTransport(group, plan, spec, traffic, is_overlapped, local_len)
    transport: Transport | None = None
    reason = _why_not_shared(group)
    if not reason:
        # Two steps, because the second one waits for all ranks, and a rank may fail in the first.
        memory, reason = _made_together(lambda: _allocate(plans, spec), group)
    if not reason:
        from overlap_mtp.exchange.symmetric import SymmetricTransport

        assert memory is not None
        shared = memory
        transport, reason = _made_together(
            lambda: SymmetricTransport(group, plans, spec, traffic, is_overlapped, local_len, shared), group
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
    return transport or NcclTransport(group, plan, spec, traffic, is_overlapped, local_len)


def _allocate(plans: list[ExchangePlan], spec: ExchangeSpec) -> torch.Tensor:
    from overlap_mtp.exchange.symmetric import allocate  # here: torch may lack symmetric memory

    return allocate(plans, spec)


def _why_not_shared(group: ExchangeGroup) -> str:
    """The known reason why ranks cannot share memory; "" if it has to be tried.

    Collective. All ranks get the same answer.
    """
    if group.why_not_symmetric:
        return group.why_not_symmetric
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{os.uname().nodename} {boot.read_text() if boot.exists() else ''}"
    mine = (hashlib.sha256(host.encode()).hexdigest(), os.environ.get("NCCL_P2P_DISABLE", "0") == "1")
    everyone: list[tuple[str, bool]] = [mine] * group.cp_size
    with group.named_errors("choosing a transport"):
        dist.all_gather_object(everyone, mine, group=group.process_group)
    if len({host for host, _ in everyone}) > 1:
        return "the ranks are on several hosts"
    return "NCCL_P2P_DISABLE is set" if any(disabled for _, disabled in everyone) else ""


def _made_together(make: Callable[[], Made], group: ExchangeGroup) -> tuple[Made | None, str]:
    """(what was made, "") if all ranks could make theirs, else (None, why one of them could not). Collective."""
    made, error = None, ""
    try:
        made = make()
    except Exception as failure:  # on any failure the process group is taken
        error = f"cp rank {group.cp_rank}: {type(failure).__name__}: {failure}"
    errors = [error] * group.cp_size
    with group.named_errors("choosing a transport"):
        dist.all_gather_object(errors, error, group=group.process_group)
    failures = "; ".join(one for one in errors if one)
    return (None, failures) if failures else (made, "")
