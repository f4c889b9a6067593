"""The ranks of a cp group compare what they are about to exchange, before any message leaves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.exchange.transport import IN_STEP

Described = dict[str, object]


def agree(
    group: ExchangeGroup,
    schedule: str,
    spec: ExchangeSpec | RowSpec | None,
    error: str | None = None,
    more: Mapping[str, object] | None = None,
) -> None:
    """Let all ranks know what each of them has. Collective and blocking.

    Args:
        group: of the ranks.
        schedule: for error messages.
        spec: of this rank's batch; None if it has an error.
        error: what is wrong on this rank.
        more: what else all ranks must share, by name.

    Raises:
        ValueError: on all ranks, if one of them has an error or two specs differ.
    """
    mine = (spec and {**spec.describe(), **(more or {})}, error)
    everyone: list[tuple[Described | None, str | None]] = [mine] * group.cp_size
    if group.cp_size > 1:
        with group.named_errors(f"the agreement before the first exchange of {schedule!r}"):
            dist.all_gather_object(everyone, mine, group=group.process_group)
    errors = [f"cp rank {rank}: {one}" for rank, (_, one) in enumerate(everyone) if one is not None]
    if errors:
        raise ValueError("; ".join(errors))
    differences = _differences([one for one, _ in everyone if one is not None])
    if differences:
        raise ValueError("the ranks of a cp group must start the same exchange: " + "; ".join(differences))


def compare_microbatches(group: ExchangeGroup, word: int, device: torch.device) -> None:
    """Let ranks whose messages carry no fingerprint compare a microbatch. Collective; it waits for the device.

    Args:
        group: of the ranks.
        word: an int64 that says what this rank starts.
        device: of the batch.

    Raises:
        RuntimeError: on all ranks, if two words differ.
    """
    if group.cp_size == 1 or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    mine = torch.tensor([word], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.cp_size)]
    with group.named_errors("the check of a microbatch of 'sync'"):
        dist.all_gather(everyone, mine, group=group.process_group)
    found = torch.cat(everyone).tolist()
    others = [rank for rank, its in enumerate(found) if its != word]
    if others:
        raise RuntimeError(
            f"overlap_mtp: cp rank {others[0]} started another microbatch than cp rank {group.cp_rank}: {IN_STEP}"
        )


def _differences(specs: list[Described]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for spec in specs for name in spec):
        values = [spec.get(name, "none") for spec in specs]
        if len(set(values)) > 1:
            found = ", ".join(f"cp rank {rank} has {value}" for rank, value in enumerate(values))
            lines.append(f"{name}: {found}")
    return lines
