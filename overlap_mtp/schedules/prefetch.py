"""prefetch: one exchange for all depths, on the side stream, under the trunk."""

from __future__ import annotations

import torch

from overlap_mtp.channel import Channel
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.base import Rolls
from overlap_mtp.schedules.wired import Exchange, WiredRoller


class PrefetchRoller(WiredRoller):
    """Every token that any depth needs is known when the batch arrives: send them all at once, then."""

    name = "prefetch"
    overlapped = True

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        super().__init__(channel, num_depths, max_documents, depths_per_exchange=num_depths)

    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls:
        return PrefetchRolls(self, self.launch(batch, layout))


class PrefetchRolls(Rolls):
    def __init__(self, roller: PrefetchRoller, exchange: Exchange) -> None:
        self._roller = roller
        self._exchange: Exchange | None = exchange
        self._rolled: list[dict[str, torch.Tensor]] = []

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            self._rolled = self._roller.land(exchange)
        return dict(self._rolled[depth - 1])
