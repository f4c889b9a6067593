"""The ranks of a cp group compare what they are about to exchange, before any message leaves."""

from __future__ import annotations

import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_spec import RowSpec
from overlap_mtp.exchange.spec import ExchangeSpec

Described = dict[str, object]


def agree(
    group: ExchangeGroup,
    schedule: str,
    spec: ExchangeSpec | RowSpec | None,
    error: str | None = None,
    number: int = 0,
) -> None:
    """Let all ranks know what each of them has. Collective and blocking.

    Args:
        group: of the ranks.
        schedule: for error messages.
        spec: of this rank's batch; None if it has an error.
        error: what is wrong on this rank.
        number: of the roller among those of the group.

    Raises:
        ValueError: on all ranks, if one of them has an error or two specs differ.
    """
    mine = (spec and {**spec.describe(), "number of the roller": number}, error)
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


def _differences(specs: list[Described]) -> list[str]:
    lines = []
    for name in specs[0]:
        values = [spec[name] for spec in specs]
        if len(set(values)) > 1:
            found = ", ".join(f"cp rank {rank} has {value}" for rank, value in enumerate(values))
            lines.append(f"{name}: {found}")
    return lines
