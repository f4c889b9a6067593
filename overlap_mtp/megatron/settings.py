"""What the drop-in was asked for, what it has done, and the rollers that it shares between forwards."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch.distributed as dist

from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.layout import KINDS, Kind
from overlap_mtp.schedules import SCHEDULES, Roller, make_roller

PADDINGS = ("exact", "megatron")
MAX_ROLLERS = 32  # of a cp group, for different kinds of batch


@dataclass(frozen=True)
class Settings:
    """What `install` was asked for; its docstring explains each."""

    schedule: str = "prefetch"
    transport: str = "auto"
    padding: Literal["exact", "megatron"] = "exact"
    layout: Kind = "zigzag"
    max_documents: int = 128
    unknown: Literal["megatron", "exact"] = "megatron"

    def __post_init__(self) -> None:
        legal = {
            "schedule": tuple(one for one in SCHEDULES if one != "prepared"),
            "transport": TRANSPORTS,
            "padding": PADDINGS,
            "unknown": PADDINGS,
            "layout": KINDS,
        }
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if not isinstance(self.max_documents, int):
            raise TypeError(f"max_documents must be a whole number, got {self.max_documents!r}")
        if self.max_documents < 1:
            raise ValueError(f"max_documents must be >= 1, got {self.max_documents}")


@dataclass
class Status:
    """What the drop-in has done on this rank since `install` or `reset_status`.

    Attributes:
        settings: those of `install`; None if it is not installed.
        version: of megatron-core.
        forwards: forwards of models with MTP in training or evaluation.
        exchanges: that were started.
        answered: rolls that were answered from an exchange.
        fallbacks: rolls without an exchange, by reason. Megatron-LM does them itself, except for those of `unknown`
            tensors if the settings say so.
    """

    settings: Settings | None = None
    version: str = ""
    forwards: int = 0
    exchanges: int = 0
    answered: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def transports(self) -> list[str]:
        """What the exchanges of the rollers in use travel over, in place of "auto"."""
        rollers = (roller for of_group in _rollers.values() for roller in of_group.values())
        return sorted({roller.transport for roller in rollers} - {""})

    def __str__(self) -> str:
        rolls = self.answered + sum(self.fallbacks.values())
        if self.settings is None and not self.forwards + rolls:
            return "overlap_mtp.megatron is not installed"
        settings = "no longer installed"
        if self.settings is not None:
            settings = ", ".join(
                f"{one.name}={getattr(self.settings, one.name)}" for one in fields(self.settings)
            )
        share = f" ({100 * self.answered / rolls:.1f} %)" if rolls else ""
        lines = [
            f"overlap_mtp.megatron on megatron-core {self.version}: {settings}",
            f"  forwards   {self.forwards}",
            f"  exchanges  {self.exchanges}{' over ' * bool(self.transports)}{', '.join(self.transports)}",
            f"  rolls      {rolls}, answered by an exchange: {self.answered}{share}",
        ]
        lines += [f"  fell back  {count}: {reason}" for reason, count in self.fallbacks.most_common()]
        return "\n".join(lines)


_status = Status()
_rollers: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Hashable, Roller]] = weakref.WeakKeyDictionary()


def status() -> Status:
    """Return what the drop-in has done on this rank. `print` shows it as a table."""
    return _status


def reset_status() -> None:
    """Count from 0 again."""
    _status.forwards = _status.exchanges = _status.answered = 0
    _status.fallbacks.clear()


def roller_for(
    cp_group: dist.ProcessGroup, settings: Settings, kind: Hashable, num_depths: int, **options: Any
) -> Roller:
    """Return the roller for a kind of batch.

    Each kind has a roller of its own: another kind in the same roller would be agreed on again, which blocks.

    Args:
        cp_group: the ranks that share a sequence.
        settings: of the drop-in.
        kind: what all batches of the roller have in common. All ranks need new kinds in the same order.
        num_depths: as in `make_roller`.
        options: of `make_roller`.

    Returns:
        The roller.
    """
    of_group = _rollers.setdefault(cp_group, {})
    key = (settings, num_depths, kind)
    roller = of_group.pop(key, None)
    if roller is None:
        if len(of_group) >= MAX_ROLLERS:
            # The one that was used least recently. It is not closed: a forward may still need what it has started.
            of_group.pop(next(iter(of_group)))
        roller = make_roller(settings.schedule, cp_group, num_depths, settings.transport, **options)
    of_group[key] = roller
    return roller


def raise_if_failed(cp_group: dist.ProcessGroup) -> None:
    """Raise what a GPU has found in an exchange of any kind of batch: the next batch may be of another kind."""
    for roller in _rollers.get(cp_group, {}).values():
        roller.raise_if_failed()


def close() -> None:
    """Free the buffers of all exchanges. The next forward makes new ones."""
    for of_group in list(_rollers.values()):
        while of_group:
            of_group.popitem()[1].close()
