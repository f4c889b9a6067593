"""Batches, legal and illegal, their rolls, and errors: what the tests of rollers share."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist

from overlap_mtp import Roller, Rolls, SequenceLayout, prepare, roll_reference

from rank_pool import device_of
from strategies import FILLS, same_bits

Batch = dict[str, torch.Tensor]
EXCHANGING = ("sync", "merged", "batched", "overlap", "prefetch")
PACKED = ("merged", "batched", "overlap", "prefetch")
TRANSPORTS = ("process_group", "symmetric")
NUM_DEPTHS = 2
ODD_RANK = 1  # the rank that differs from the others
DOCUMENTS = ((0, 4, 12), (0, 1, 1, 5, 12), (0, 2, 3, 4, 9, 12))  # bounds, in chunks of one token


def packed(cp_size: int, variant: int = 0) -> SequenceLayout:
    """Documents that give every rank some tokens: 24 a rank in all variants."""
    return SequenceLayout.packed([2 * cp_size * one for one in DOCUMENTS[variant % 3]], cp_size)


def full_batch(layout: SequenceLayout, rows: int = 2, shift: int = 0) -> Batch:
    """Three tensors of three dtypes. All tokens differ, and other shifts give other tokens."""
    tokens = torch.arange(rows * layout.seq_len).view(rows, layout.seq_len) + shift
    return {"input_ids": tokens, "labels": tokens.int() + 7, "loss_mask": tokens.float() / 8}


def differences(
    rolled: list[Batch], full: Batch, layout: SequenceLayout, rank: int, depths: dict[str, int] | None = None
) -> list[str]:
    """Names and depths at which a rank's rolled tensors, by depth, are not the reference's, bit for bit."""
    wrong = []
    for depth, tensors in enumerate(rolled, start=1):
        names = [name for name in sorted(full) if (depths or {}).get(name, depth) >= depth]
        assert sorted(tensors) == names
        for name in names:
            tensor = full[name]
            expected = roll_reference(tensor, layout, depth, fill=FILLS.get(name, 0))
            if not same_bits(tensors[name].cpu(), layout.shard(expected, rank)):
                wrong.append(f"{name} at depth {depth}")
    return wrong


@dataclass
class Microbatch:
    """A full batch, and one rank's part in it. It keeps no shard alive: `shards` makes new ones each time."""

    group: dist.ProcessGroup | None  # None for one rank that holds everything
    layout: SequenceLayout
    full: Batch

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup | None,
        variant: int = 0,
        shift: int = 0,
        rows: int = 2,
        layout: SequenceLayout | None = None,
    ) -> Microbatch:
        """A `full_batch` in the given layout; default: `packed`."""
        layout = layout or packed(group.size() if group else 1, variant)
        return cls(group, layout, full_batch(layout, rows, shift))

    @property
    def rank(self) -> int:
        return self.group.rank() if self.group else 0

    def shards(self, schedule: str = "", num_depths: int = NUM_DEPTHS) -> Batch:
        full = prepare(self.full, self.layout, num_depths) if schedule == "prepared" else self.full
        device = device_of(self.group)
        return {name: self.layout.shard(t, self.rank).to(device) for name, t in full.items()}

    def start(self, roller: Roller) -> Rolls:
        return roller.start(self.shards(roller.name, roller.num_depths), self.layout)

    def wrong(self, rolls: Rolls, num_depths: int = NUM_DEPTHS) -> list[str]:
        """What is wrong with rolls that were started from these shards."""
        return self.differences([rolls.at(depth) for depth in range(1, num_depths + 1)])

    def differences(self, rolled: list[Batch]) -> list[str]:
        """What is wrong with rolled shards, by depth."""
        return differences(rolled, self.full, self.layout, self.rank)


def error_of(call: Callable[..., object], *arguments: object) -> str:
    """What a call raises, as "Type: message", or "nothing"."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def short_patience(transport: ModuleType, group: dist.ProcessGroup) -> AbstractContextManager[object]:
    """Let kernels of transports that are made meanwhile wait for 2 s, or 10,000 turns if they are interpreted."""
    turns_or_ns = 10_000 if dist.get_backend(group) == "gloo" else 2 * 10**9

    def timeout_of(_: object, device: torch.device) -> torch.Tensor:
        return torch.tensor([turns_or_ns], device=device)

    return mock.patch.object(transport, "timeout_of", timeout_of)


def assert_names(message: str, *words: str) -> None:
    """Check that `message` is of a ValueError and holds all words."""
    assert message.startswith("ValueError: "), message
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", message), f"{word!r} is not in {message!r}"


def replace_labels(batch: Batch, make: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with other labels, and with others for all their rolls if it is prepared."""
    return {name: make(t) if name.startswith("labels") else t for name, t in batch.items()}


def double(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([tensor, tensor], dim)


# Batches that no rank can start, made from good ones, and what the error says.
ILLEGAL: dict[str, tuple[Callable[[Batch], Batch], list[str]]] = {
    "int16": (lambda b: replace_labels(b, torch.Tensor.short), ["labels", "int16", "convert it to int64"]),
    "float8": (lambda b: replace_labels(b, lambda t: t.to(torch.float8_e5m2)), ["convert it to float32"]),
    "complex64": (lambda b: replace_labels(b, lambda t: t + 1j), ["labels", "complex64", "imaginary part"]),
    "labels that cannot be -100": (
        lambda b: replace_labels(b, torch.Tensor.byte),
        ["labels", "uint8", "-100", "int64", "ignore_index"],
    ),
    "one tensor too long": (lambda b: replace_labels(b, lambda t: double(t, -1)), ["labels", "24", "48"]),
    "all tensors too long": (lambda b: {name: double(t, -1) for name, t in b.items()}, ["24", "48"]),
    "another device": (lambda b: replace_labels(b, lambda t: t.to("meta")), ["labels", "meta", "cpu"]),
    "no tensor": (lambda b: {}, ["tensor"]),
    "a sparse tensor": (
        lambda b: replace_labels(b, torch.Tensor.to_sparse),
        ["labels", "dense", "torch.sparse_coo"],
    ),
    "a nested tensor": (
        lambda b: replace_labels(b, lambda t: torch.nested.nested_tensor([t[0], t[1]])),
        ["labels", "dense", "a nested tensor"],
    ),
    "a list": (lambda b: replace_labels(b, torch.Tensor.tolist), ["labels", "a dense tensor, got list"]),
    "no rows": (lambda b: {name: t[:0] for name, t in b.items()}, ["at least one row"]),
    "names of other types": (lambda b: {**b, 7: b["labels"]}, ["names", "7", "int"]),
    "no batch": (lambda b: object(), ["dict", "object"]),
}


def copy_late(
    made: dict[str, torch.Tensor],
    late: dict[str, torch.Tensor],
    stream: torch.cuda.Stream,
    ready: torch.cuda.Event,
) -> None:
    """Let a stream copy tensors after some 10 ms, and record an event of it. Nothing else is under way then."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, tensor in made.items():
            late[name].copy_(tensor)
        ready.record()
