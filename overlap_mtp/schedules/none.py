"""none: no roll at all. Wrong tokens, for timing only: it shows what `prepared` itself costs."""

from __future__ import annotations

import torch

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.roller import Batch, Roller, Rolls, detached


class NoneRoller(Roller):
    name = "none"

    def _start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None) -> Rolls:
        return NoneRolls(self, detached(batch))


class NoneRolls(Rolls):
    def __init__(self, roller: NoneRoller, batch: dict[str, torch.Tensor]) -> None:
        self._roller = roller
        self._batch = batch

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        return dict(self._batch)
