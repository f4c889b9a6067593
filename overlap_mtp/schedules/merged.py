"""merged: one exchange per depth, all tensors and documents in it, waited for where it is launched.

The MR's improvement (a) without (b): what merging alone brings.
"""

from __future__ import annotations

import torch

from overlap_mtp.channel import Channel
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.base import ChainedRolls, Rolls
from overlap_mtp.schedules.wired import WiredRoller


class MergedRoller(WiredRoller):
    name = "merged"
    overlapped = False

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        super().__init__(channel, num_depths, max_documents, depths_per_exchange=1)

    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls:
        return ChainedRolls(self, batch, lambda rolled: self.land(self.launch(rolled, layout))[0])
