"""prepared: no exchange. The full batch is rolled before it is sharded, and the rolls travel in the batch.

The MR's alternative 2 and what most frameworks do: the floor to measure against. It needs the whole sequence on
every rank (or in the loader), num_depths more tensors per tensor, and a model that takes them.
"""

from __future__ import annotations

import re

import torch

from overlap_mtp.exchange.spec import fill_of
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference
from overlap_mtp.schedules.roller import Batch, Roller, Rolls, detached

PREPARED = re.compile(r"_depth\d+$")


def prepared_name(name: str, depth: int) -> str:
    """The key under which `prepare` puts the roll of `name` at `depth`."""
    return f"{name}_depth{depth}"


def prepare(batch: Batch, layout: SequenceLayout, num_depths: int) -> dict[str, torch.Tensor]:
    """Rolls a full-length batch ([..., S] each) at every depth, before it is sharded.

    Returns a flat dict of full-length tensors: the original names, and `prepared_name(name, depth)` for each
    name and depth. Shard it like any other batch and give it to the `start` of a `prepared` roller.
    """
    if num_depths < 1:
        raise ValueError(f"num_depths must be >= 1, got {num_depths}")
    prepared = dict(batch)
    for name, tensor in batch.items():
        for depth in range(1, num_depths + 1):
            prepared[prepared_name(name, depth)] = roll_reference(tensor, layout, depth, fill_of(name))
    return prepared


class PreparedRoller(Roller):
    name = "prepared"

    def _start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None) -> Rolls:
        return PreparedRolls(self, detached(batch))

    def _check_names(self, batch: Batch) -> None:
        names = [name for name in batch if not PREPARED.search(name)]
        missing = [
            prepared_name(name, depth)
            for name in names
            for depth in range(1, self.num_depths + 1)
            if prepared_name(name, depth) not in batch
        ]
        if missing:
            raise ValueError(
                f"a batch for the prepared schedule must hold {missing[0]}: roll the full batch with "
                f"prepare(batch, layout, num_depths={self.num_depths}) before sharding it"
            )


class PreparedRolls(Rolls):
    def __init__(self, roller: PreparedRoller, batch: dict[str, torch.Tensor]) -> None:
        self._roller = roller
        self._batch = batch

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        batch = self._batch
        return {
            name: batch[prepared_name(name, depth)] for name in batch if prepared_name(name, depth) in batch
        }
