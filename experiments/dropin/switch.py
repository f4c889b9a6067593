"""Changes who rolls between two steps, while exchanges stay open."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from dropin.modes import BASELINE, REFERENCE
from overlap_mtp import megatron as drop_in
from overlap_mtp.tracing import span


def local_roll(
    tensor: torch.Tensor | None, shifts: int = -1, dims: int = -1, *_: Any, **__: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Roll what this rank holds, with the sum, and send nothing. The tokens at chunks' ends are wrong: timing only."""
    if tensor is None:
        return None, None
    rolled = torch.roll(tensor, shifts, dims)
    return rolled, rolled.sum()


def _traced(roll: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(roll)
    def roll_tensor(*arguments: Any, **options: Any) -> Any:
        with span("send-recv", REFERENCE):
            return roll(*arguments, **options)

    return roll_tensor


class Switch:
    """Installs the drop-in once, and then changes between Megatron-LM's functions and what replaces them.

    `install` and `uninstall` between any two steps would time how exchanges are set up, which a training does once.
    So this notes what `install` has replaced in Megatron-LM, and puts either the original or the replacement there.

    Args:
        schedule, transport: of the drop-in.
        traced: name Megatron-LM's own rolls in profiles, as the drop-in names its exchange.
    """

    def __init__(self, schedule: str, transport: str, traced: bool = False) -> None:
        drop_in.install(schedule=schedule, transport=transport)
        drop_in.uninstall()  # by now it has imported all modules that it changes
        before = _attributes()
        drop_in.install(schedule=schedule, transport=transport)
        after = _attributes()
        changed = [key for key, (_, value) in before.items() if key in after and after[key][1] is not value]
        self._original = {key: before[key] for key in changed}
        self._replaced = {key: after[key] for key in changed}
        local = {key: (owner, local_roll) for key, (owner, _) in before.items() if key[1] == "roll_tensor"}
        self._local = {**self._original, **local}
        self._rolls = {key: before[key] for key in local}
        self._traced = {key: (owner, _traced(roll)) for key, (owner, roll) in self._rolls.items() if traced}

    def to(self, mode: str) -> None:
        """Change to one of MODES."""
        chosen = {**self._rolls, **self._original}
        if mode.startswith("dropin"):
            chosen |= self._replaced
        elif mode == BASELINE:
            chosen |= self._local
        else:
            chosen |= self._traced
        for (_, name), (owner, value) in chosen.items():
            setattr(owner, name, value)

    def close(self) -> None:
        """Take the drop-in out and give back what it holds."""
        self.to("dropin")
        drop_in.uninstall()


def _attributes() -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return all of Megatron-LM's modules' and classes' attributes: {(where, name): (owner, value)}."""
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.") or module is None:
            continue
        owners: dict[str, Any] = {module_name: module}
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module_name:
                owners[f"{module_name}.{value.__qualname__}"] = value
        for where, owner in owners.items():
            found |= {(where, name): (owner, value) for name, value in list(vars(owner).items())}
    return found
