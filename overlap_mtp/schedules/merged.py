"""merged: one exchange per depth, all tensors and documents in it, waited for where it is launched.

The MR's improvement (a) without (b): what merging alone brings.
"""

from __future__ import annotations

import torch

from overlap_mtp.channel import Channel
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.base import Rolls
from overlap_mtp.schedules.wired import WiredRoller


class MergedRoller(WiredRoller):
    name = "merged"
    overlapped = False

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        super().__init__(channel, num_depths, max_documents, depths_per_exchange=1)

    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls:
        return MergedRolls(self, batch, layout)


class MergedRolls(Rolls):
    def __init__(self, roller: MergedRoller, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> None:
        self._roller = roller
        self._layout = layout
        self._rolled = [batch]  # by depth, the batch itself at 0

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        while len(self._rolled) <= depth:
            exchange = self._roller.launch(self._rolled[-1], self._layout)
            self._rolled += self._roller.land(exchange)
        return dict(self._rolled[depth])
