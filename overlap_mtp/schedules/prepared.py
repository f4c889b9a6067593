"""prepared and none: two schedules without an exchange.

prepared: the full batch is rolled before it is sharded, and the rolls travel in the batch. Most frameworks do this, and
it is the floor to measure against. It needs the whole sequence on every rank or in the loader, num_depths more tensors
for each tensor, and a model that takes them.

none: no roll at all. It returns wrong tokens and is for timing only: it shows what `prepared` itself costs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.spec import Batch, check_fill, roll_options
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference
from overlap_mtp.schedules.roller import Roller, Rolls, Spec, Tokens, detached
from overlap_mtp.tensors import IGNORE_INDEX

PREPARED = re.compile(r"_depth\d+$")


def prepared_name(name: str, depth: int) -> str:
    """Return the key that `prepare` gives to a roll.

    Args:
        name: of the tensor that is rolled.
        depth: of the roll, from 1.
    """
    return f"{name}_depth{depth}"


def prepare(
    batch: Batch,
    layout: SequenceLayout,
    num_depths: int,
    ignore_index: int = IGNORE_INDEX,
    fills: Mapping[str, float] | None = None,
    depths: Mapping[str, int] | None = None,
) -> Tokens:
    """Roll a full-length batch at every depth, before it is sharded.

    Args:
        batch: full-length tensors by name, [..., S] each.
        layout: of the batch.
        num_depths: at least 1.
        ignore_index, fills, depths: as in `make_roller`.

    Returns:
        Full-length tensors: those of the batch, and `prepared_name(name, depth)` for each name and depth. Shard them
        like any other batch and give them to `start` of a `prepared` roller.

    Raises:
        ValueError: if an argument is out of range, a tensor has another length, or `labels` cannot hold `ignore_index`.
    """
    options = roll_options(num_depths, 1, ignore_index, fills, depths)
    prepared = {name: tensor for name, tensor in batch.items() if tensor is not None}
    for name, tensor in list(prepared.items()):
        fill = options.fills.get(name, 0)
        check_fill(name, tensor.dtype, fill)
        for depth in range(1, options.depths.get(name, num_depths) + 1):
            prepared[prepared_name(name, depth)] = roll_reference(tensor, layout, depth, fill)
    return prepared


class PreparedRoller(Roller):
    """Hands out the rolls that are in the batch (prepared), or the batch itself (none)."""

    def _start(self, batch: Batch, layout: Layout, ready: torch.cuda.Event | None) -> Rolls:
        return PreparedRolls(self, detached(batch))

    def _check(self, spec: Spec) -> None:
        if self.name == "none":
            return
        wanted = (
            prepared_name(name, depth)
            for name in spec.names
            if not PREPARED.search(name)
            for depth in range(1, self.options.depths.get(name, self.num_depths) + 1)
        )
        missing = next((name for name in wanted if name not in spec.names), None)
        if missing:
            raise ValueError(
                f"a batch for the prepared schedule must hold {missing}: roll the full batch with prepare(batch, "
                f"layout, num_depths={self.num_depths}) before sharding it"
            )


class PreparedRolls(Rolls):
    def __init__(self, roller: PreparedRoller, batch: Tokens) -> None:
        self._roller = roller
        self._batch = batch

    def at(self, depth: int) -> Tokens:
        self._roller.check_depth(depth)
        batch = self._batch
        if self._roller.name == "none":
            return self._roller.at_depth(batch, depth)
        names = {name: prepared_name(name, depth) for name in batch}
        return {name: batch[rolled] for name, rolled in names.items() if rolled in batch}
