"""Batches, legal and not, that tests of errors share."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, prepare, roll_reference

from rank_pool import device_of
from strategies import same_bits

EXCHANGING = ("sync", "merged", "overlap", "prefetch")
PACKED = ("merged", "overlap", "prefetch")
NUM_DEPTHS = 2
PACKED_LEN = 24


def packed(cp_size: int) -> SequenceLayout:
    """Two documents of which every rank holds something."""
    return SequenceLayout.packed([0, 8 * cp_size, PACKED_LEN * cp_size], cp_size)


def full_batch(layout: SequenceLayout, rows: int = 2) -> dict[str, torch.Tensor]:
    tokens = torch.arange(rows * layout.seq_len).view(rows, layout.seq_len)
    return {"input_ids": tokens, "labels": tokens.int() + 7, "loss_mask": tokens.float() / 8}


def local_batch(
    schedule: str, layout: SequenceLayout, rank: int, rows: int = 2, num_depths: int = NUM_DEPTHS
) -> dict[str, torch.Tensor]:
    full = full_batch(layout, rows)
    if schedule == "prepared":
        full = prepare(full, layout, num_depths)
    return {name: layout.shard(tensor, rank) for name, tensor in full.items()}


def local_to(group: dist.ProcessGroup, schedule: str, layout: SequenceLayout, **options: int):
    device = device_of(group)
    return {name: t.to(device) for name, t in local_batch(schedule, layout, group.rank(), **options).items()}


def wrong_rolls(rolls, layout: SequenceLayout, rank: int, rows: int = 2) -> list[str]:
    """Names and depths that differ from the oracle."""
    wrong = []
    for depth in range(1, NUM_DEPTHS + 1):
        rolled = rolls.at(depth)
        for name, tensor in full_batch(layout, rows).items():
            expected = layout.shard(roll_reference(tensor, layout, depth), rank)
            if not same_bits(rolled[name].cpu(), expected):
                wrong.append(f"{name} at depth {depth}")
    return wrong


def error_of(call: Callable[[], object]) -> str:
    """What `call` raises, as "Type: message", or "nothing"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def assert_names(message: str, *words: str) -> None:
    assert message.startswith("ValueError: "), message
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message), f"{word!r} is not in {message!r}"


ODD_RANK = 1  # differs from the others where ranks must be alike


def other_dtype(batch, layout):
    return replaced(batch, torch.Tensor.long), layout


def replaced(batch: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]):
    """The batch with another tensor for labels; a prepared batch with others for all its rolls too."""
    return {name: make(t) if name.startswith("labels") else t for name, t in batch.items()}


ILLEGAL = {
    "float64": (
        lambda batch: replaced(batch, torch.Tensor.double),
        ["labels", "float64", "int64", "bfloat16"],
    ),
    "float16": (lambda batch: replaced(batch, torch.Tensor.half), ["labels", "float16", "float32"]),
    "one tensor too long": (
        lambda batch: replaced(batch, lambda t: torch.cat([t, t], -1)),
        ["labels", "24", "48"],
    ),
    "one tensor of more rows": (
        lambda batch: replaced(batch, lambda t: torch.cat([t, t])),
        ["labels", "2", "4"],
    ),
    "all tensors too long": (
        lambda batch: {n: torch.cat([t, t], -1) for n, t in batch.items()},
        ["24", "48"],
    ),
    "another device": (lambda batch: replaced(batch, lambda t: t.to("meta")), ["labels", "meta", "cpu"]),
    "no tensor": (lambda batch: {}, ["tensor"]),
}
