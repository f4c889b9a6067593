"""overlap: one exchange per depth on the side stream; depth k + 1 travels while MTP layer k computes.

The MR's improvement (b). Depth k + 1 is depth k rolled by one, so each exchange carries one token a chunk. This
is the order that values need which are not known in advance, such as activations.
"""

from __future__ import annotations

import torch

from overlap_mtp.channel import Channel
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.base import Rolls
from overlap_mtp.schedules.wired import WiredRoller


class OverlapRoller(WiredRoller):
    name = "overlap"
    overlapped = True

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        super().__init__(channel, num_depths, max_documents, depths_per_exchange=1)

    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls:
        return OverlapRolls(self, batch, layout)


class OverlapRolls(Rolls):
    def __init__(self, roller: OverlapRoller, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> None:
        self._roller = roller
        self._layout = layout
        self._rolled: list[dict[str, torch.Tensor]] = []
        self._exchange = roller.launch(batch, layout)

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        while len(self._rolled) < depth:
            (rolled,) = self._roller.land(self._exchange)
            self._rolled.append(rolled)
            if len(self._rolled) < self._roller.num_depths:
                self._exchange = self._roller.launch(rolled, self._layout)
        return dict(self._rolled[depth - 1])
