"""Which transport an exchange takes. All ranks of a group decide it together."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_gloo import GlooRowTransport
from overlap_mtp.exchange.row_transport import RowTransport
from overlap_mtp.exchange.rows import RowPlan
from overlap_mtp.exchange.transport import Transport, TransportConfig

TRANSPORTS = ("auto", "process_group", "symmetric")

Made = TypeVar("Made")
_log = logging.getLogger("overlap_mtp")


def make_transport(config: TransportConfig) -> Transport:
    """Make the transport that the spec asks for. Collective over the group.

    "auto" means symmetric memory if all ranks can share it, and otherwise the process group: symmetric memory holds up
    compute for less time and takes less of the host's (experiments/results).

    Args:
        config: of this rank.

    Returns:
        The transport.

    Raises:
        ValueError: on all ranks, if "symmetric" is asked for and one of them cannot.
    """
    if config.spec.device.type == "cpu":
        from overlap_mtp.exchange.gloo import GlooTransport

        _refuse_symmetric_on_cpu(config)
        return GlooTransport(config)
    return between_gpus(config)


def between_gpus(config: TransportConfig) -> Transport:
    """The transport of tokens between GPUs, as `make_transport`."""
    from overlap_mtp.exchange.nccl import NcclTransport  # here: Triton compiles for a GPU

    def prepare() -> Callable[[], Transport]:
        from overlap_mtp.exchange import symmetric  # here: torch may lack symmetric memory

        return partial(symmetric.SymmetricTransport, config, symmetric.allocate(config))

    return _make_symmetric(config, "tokens", prepare) or NcclTransport(config)


def make_row_transport(
    config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None
) -> RowTransport:
    """The same for activations. Only `overlap` without tp ranks takes symmetric memory.

    Args:
        config: of this rank.
        plans: of all cp ranks.
        tp_group: the tp ranks that share rows, if there are several.

    Returns:
        The transport.

    Raises:
        ValueError: as `make_transport`.
    """
    if config.spec.device.type == "cpu":
        _refuse_symmetric_on_cpu(config)
        return GlooRowTransport(config, plans, tp_group)
    return rows_between_gpus(config, plans, tp_group)


def rows_between_gpus(
    config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None
) -> RowTransport:
    """The transport of activations between GPUs, as `make_row_transport`."""
    from overlap_mtp.exchange.row_nccl import NcclRowTransport  # here: Triton compiles for a GPU

    def prepare() -> Callable[[], RowTransport]:
        from overlap_mtp.exchange import row_symmetric as symmetric  # here: torch may lack symmetric memory

        return partial(symmetric.SymmetricRowTransport, config, plans, symmetric.allocate(config, plans))

    may_be_symmetric = tp_group is None and config.spec.schedule == "overlap"
    made = _make_symmetric(config, "activations", prepare) if may_be_symmetric else None
    return made or NcclRowTransport(config, plans, tp_group)


def _refuse_symmetric_on_cpu(config: TransportConfig) -> None:
    if config.spec.transport == "symmetric":
        raise ValueError("transport symmetric needs GPUs that share memory, the batch is on the CPU")


def _make_symmetric(
    config: TransportConfig, carries: str, prepare: Callable[[], Callable[[], Made]]
) -> Made | None:
    """A transport over symmetric memory if it is wanted and all ranks can share it, else None. Collective.

    `prepare` allocates the memory, and returns what makes the transport.

    Raises:
        ValueError: if nothing else was asked for.
    """
    from overlap_mtp.exchange.cuda import free_orphans

    free_orphans()  # here, because a wait delays no step, and before more is allocated
    group, asked = config.group, config.spec.transport
    if asked == "process_group" or group.cp_size == 1:
        return None
    said, transport = group.why_not_symmetric.get(carries), None
    reason = said or _why_not_shared(group)
    if not reason:
        # Two steps, because the second one waits for all ranks, and a rank may fail in the first.
        make, reason = _made_together(prepare, group)
        if make is not None:
            transport, reason = _made_together(make, group)
    if asked == "symmetric" and reason:
        raise ValueError(f"transport symmetric does not work here: {reason}")
    if group.cp_rank == 0 and said is None:
        chosen = "process_group" if reason else "symmetric"
        why = reason or "all ranks can write to each other's memory"
        _log.info(
            "overlap_mtp: transport %s for %s of a cp group of %d: %s", chosen, carries, group.cp_size, why
        )
    group.why_not_symmetric[carries] = reason
    return transport


def _why_not_shared(group: ExchangeGroup) -> str:
    """The known reason why ranks cannot share memory; "" if it has to be tried.

    Collective. All ranks get the same answer.
    """
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
