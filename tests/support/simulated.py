"""Batches on simulated ranks, for tests of plans and kernels without any process."""

from __future__ import annotations

import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.outputs import allocate_outputs
from overlap_mtp.exchange.plan import ExchangePlan, make_metadata
from overlap_mtp.exchange.spec import ExchangeSpec, RollOptions, column_addresses, fills_of
from overlap_mtp.layout import SequenceLayout

from cases import Batch, differences

POISON = 0x5A


def poisoned(*shape: int) -> torch.Tensor:
    """An int64 tensor of bytes that no test expects."""
    return torch.full((*shape, 8), POISON, dtype=torch.uint8).view(torch.int64).squeeze(-1)


def spec_of(
    full: Batch,
    layout: SequenceLayout,
    num_depths: int,
    max_documents: int,
    depths: dict[str, int] | None = None,
) -> ExchangeSpec:
    """The spec that all ranks of a batch have."""
    group = ExchangeGroup(None)
    group.cp_size = layout.cp_size
    shard = {name: layout.shard(t, 0) for name, t in full.items()}
    options = RollOptions(num_depths, max_documents, fills_of(), depths or {})
    return ExchangeSpec.of(shard, layout, group, "prefetch", "auto", options)


class RankBatch:
    """One rank's part in an exchange: its tensors, outputs to be written, and metadata with the addresses of both."""

    def __init__(self, full: Batch, layout: SequenceLayout, plan: ExchangePlan, spec: ExchangeSpec) -> None:
        self.full, self.layout, self.plan, self.spec = full, layout, plan, spec
        tensors = [layout.shard(full[name], plan.cp_rank) for name in spec.names]
        (outputs,) = allocate_outputs(spec, tensors, plan.num_depths)
        self.rolled = outputs.depths
        for tensors_at_depth in self.rolled:
            for tensor in tensors_at_depth.values():
                tensor.view(torch.uint8).fill_(POISON)
        addresses = column_addresses(tensors, spec.parts) + outputs.addresses
        self.host_metadata = torch.cat(
            [torch.from_numpy(make_metadata(layout, plan)), torch.tensor(addresses)]
        )
        self.replay_metadata = torch.full_like(self.host_metadata, -1)
        self.metadata = poisoned(len(self.host_metadata))
        # As the reference takes them: views as integers.
        self.tensors = spec.columns(tensors)
        self.outputs = []
        for name in spec.names:
            by_depth = [spec.columns([one[name]]) for one in self.rolled if name in one]
            self.outputs += [list(column) for column in zip(*by_depth, strict=True)]

    def wrong(self) -> list[str]:
        """What is wrong with the outputs."""
        depths = dict(zip(self.spec.names, self.spec.depths, strict=True))
        return differences(self.rolled, self.full, self.layout, self.plan.cp_rank, depths)
