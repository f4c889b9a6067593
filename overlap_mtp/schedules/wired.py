"""What the schedules with a wire share (merged, overlap, prefetch): plans, tables and transports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from overlap_mtp.channel import Channel
from overlap_mtp.dtypes import INTEGER_VIEW
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.plan import PlanShape, RollPlan, build_plan, plan_shape
from overlap_mtp.recent import Recent
from overlap_mtp.schedules.base import Roller, fill_of
from overlap_mtp.transport import Flight, ProcessGroupTransport, Transport
from overlap_mtp.upload import upload

ONE = {dtype: int(torch.ones(1, dtype=dtype).view(view)) for dtype, view in INTEGER_VIEW.items()}


@dataclass
class Exchange:
    """One exchange under way: its tensors and who lands it."""

    batch: dict[str, torch.Tensor]
    transport: Transport
    flight: Flight


class WiredRoller(Roller):
    """A roller whose exchanges carry all tensors and documents, and `depths_per_exchange` depths, at once."""

    overlapped: bool

    def __init__(
        self, channel: Channel, num_depths: int, max_documents: int, depths_per_exchange: int
    ) -> None:
        super().__init__(channel, num_depths, max_documents)
        self._depths_per_exchange = depths_per_exchange
        self._transports: dict[object, Transport] = {}
        self._shapes: Recent[PlanShape] = Recent()
        self._plans: Recent[RollPlan] = Recent()
        self._tables: Recent[torch.Tensor] = Recent()

    def plan(self, layout: SequenceLayout) -> RollPlan:
        """This rank's plan for a layout, from the last few. A data loader may call it ahead of `start`."""
        return self._plans.get(layout.key, lambda: build_plan(layout, self._shape(layout)))

    def launch(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Exchange:
        """Sends what peers need to roll `batch` by up to `depths_per_exchange`."""
        self._check_open()
        first = next(iter(batch.values()))
        plan = self.plan(layout)
        tensors = [_integers(tensor) for tensor in batch.values()]
        transport = self._transport(plan, len(tensors) * tensors[0].shape[0], first.device)
        transport.check()
        table = self._tables.get((layout.key, first.device), lambda: upload(plan.table, first.device))
        flight = transport.launch(tensors, table)
        return Exchange(batch, transport, flight)

    def land(self, exchange: Exchange) -> list[dict[str, torch.Tensor]]:
        """The rolled tensors of each depth of the exchange, freshly allocated."""
        depths = self._depths_per_exchange
        outputs = {name: tensor.new_empty((depths, *tensor.shape)) for name, tensor in exchange.batch.items()}
        views = [_integers(out) for out in outputs.values()]
        exchange.transport.land(exchange.flight, views, _fills(exchange.batch))
        exchange.transport.check()
        return [{name: out[d] for name, out in outputs.items()} for d in range(depths)]

    def close(self) -> None:
        super().close()
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            transport.close()

    def _transport(self, plan: RollPlan, words: int, device: torch.device) -> Transport:
        key = (plan.shape, words, device)
        if key not in self._transports:
            self._transports[key] = ProcessGroupTransport(
                self._channel, plan.shape, words, device, self.overlapped, self.traffic
            )
        return self._transports[key]

    def _shape(self, layout: SequenceLayout) -> PlanShape:
        return self._shapes.get(
            (layout.is_packed, layout.kind, None if layout.is_packed else layout.seq_len),
            lambda: plan_shape(layout, self._channel.cp_rank, self._depths_per_exchange, self.max_documents),
        )


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """[B, L] of integers of the same width: a view, or a copy of a tensor that is not contiguous."""
    view = INTEGER_VIEW[tensor.dtype]
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.dtype != view:
        tensor = tensor.view(view)
    return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])


def _fills(batch: dict[str, torch.Tensor]) -> Sequence[int]:
    return [ONE[tensor.dtype] if fill_of(name) else 0 for name, tensor in batch.items()]
