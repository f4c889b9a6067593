"""Batches, shards and specs of simulated ranks, for tests of plans and kernels without any process."""

from __future__ import annotations

import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.spec import ExchangeSpec
from overlap_mtp.layout import SequenceLayout

from strategies import DTYPES, random_tensor

POISON = 0x5A
Batch = dict[str, torch.Tensor]


def poisoned(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), POISON, dtype=torch.uint8).view(dtype).reshape(shape)


def random_batch(layout: SequenceLayout, rows: int, seed: int) -> Batch:
    """Full tensors [rows, S] of every dtype, and a padding mask."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        f"t{i}": random_tensor((rows, layout.seq_len), dtype, generator) for i, dtype in enumerate(DTYPES)
    }
    return {**batch, "padding_mask": random_tensor((rows, layout.seq_len), torch.bool, generator)}


def shards_of(layout: SequenceLayout, batch: Batch) -> list[Batch]:
    return [{name: layout.shard(t, rank) for name, t in batch.items()} for rank in range(layout.cp_size)]


def spec_of(shard: Batch, layout: SequenceLayout, num_depths: int, max_documents: int) -> ExchangeSpec:
    """The spec of a simulated rank's batch."""
    group = ExchangeGroup(None)
    group.cp_size = layout.cp_size
    return ExchangeSpec.of(shard, layout, group, "prefetch", "auto", num_depths, max_documents)
