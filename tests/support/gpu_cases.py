"""Batches on GPUs that differ from turn to turn, and what their rolls must be."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, roll_reference

from cases import full_batch
from rank_pool import device_of
from strategies import same_bits

TRANSPORTS = ("process_group", "symmetric")
TOKENS = 32  # a rank


def packed(cp_size: int, variant: int) -> SequenceLayout:
    """Documents of other lengths, one of them empty, in the same stream length."""
    unit, total = 2 * cp_size, TOKENS // 2
    cuts = [[0, 1, 1, 5, total], [0, 7, total], [0, 2, 3, 4, 9, total]][variant % 3]
    return SequenceLayout.packed([cut * unit for cut in cuts], cp_size)


def shards(layout: SequenceLayout, group: dist.ProcessGroup, shift: int) -> dict[str, torch.Tensor]:
    full = {name: tensor + shift for name, tensor in full_batch(layout).items()}
    return {n: layout.shard(t, group.rank()).to(device_of(group)) for n, t in full.items()}


def differences(
    rolled: list[dict[str, torch.Tensor]], layout: SequenceLayout, rank: int, shift: int
) -> list[str]:
    wrong = []
    for depth, tensors in enumerate(rolled, start=1):
        for name, tensor in full_batch(layout).items():
            expected = layout.shard(roll_reference(tensor + shift, layout, depth), rank)
            if not same_bits(tensors[name].cpu(), expected):
                wrong.append(f"{name} at depth {depth}, shift {shift}")
    return wrong
