"""Do all ranks of a run have the same settings and data? Otherwise they would train on something else in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist


class SettingsDifferError(RuntimeError):
    """Ranks were started with different settings or data."""


def check_same_on_all_ranks(settings: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Compare settings over the ranks of a group. Collective: one gather of objects.

    Args:
        settings: of this rank, by name. Values are compared as text.
        group: default: all ranks.

    Raises:
        SettingsDifferError: on all ranks, naming each setting that differs, both values and a rank of each.
    """
    mine = {name: str(value) for name, value in settings.items()}
    everyone: list[dict[str, str]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    differ = []
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [one.get(name, "absent") for one in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differ.append(f"{name} is {values[0]} on rank 0, {values[other]} on rank {other}")
    if differ:
        raise SettingsDifferError(f"start all ranks with the same settings and data: {'; '.join(differ)}")
