"""The interface that all schedules share, and the checks that come before any message leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from overlap_mtp.channel import Channel
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.transport import Traffic

Batch = Mapping[str, torch.Tensor]

INTEGER_VIEW = {
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.bool: torch.uint8,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
}
FILL_IS_ONE = frozenset({"padding_mask"})  # where a token is missing, it is padding


def fill_of(name: str) -> int:
    """What a rolled tensor holds past the end of a document: 0, or 1 (True) for `padding_mask`."""
    return 1 if name in FILL_IS_ONE else 0


class Rolls(ABC):
    """The rolled tensors of one microbatch."""

    @abstractmethod
    def at(self, depth: int) -> dict[str, torch.Tensor]:
        """Every tensor of the batch shifted left by `depth` (1-based), by name, in its own dtype and shape.

        The tensors are this microbatch's own: nothing overwrites them. Waits for the exchange where the
        schedule has one, on the current stream (CUDA) or on the host (CPU). Until the last depth was taken, do
        not write into these tensors or into those given to `start`: what follows may be rolled from them.
        Raises ValueError outside [1, num_depths], and RuntimeError where a peer rolled by another layout: the
        ranks are then out of step, and the cp group is of no further use.
        """


@dataclass(frozen=True)
class Signature:
    """What the ranks of a cp group must have in common before a message may leave."""

    schedule: str
    num_depths: int
    max_documents: int
    layout: str
    tensors: tuple[str, ...]  # "name dtype shape" each, sorted


class Roller(ABC):
    """Rolls the tensors of microbatch after microbatch by one schedule. Made by `make_roller`."""

    name: str

    def __init__(self, channel: Channel, num_depths: int, max_documents: int) -> None:
        self.num_depths = num_depths
        self.max_documents = max_documents
        self.traffic = Traffic()
        self._channel = channel
        self._current: Signature | None = None  # what all ranks agreed on last
        self._signatures: dict[Hashable, Signature] = {}  # of the kinds of batches that passed all checks
        self._closed = False

    def start(self, batch: Batch, layout: SequenceLayout) -> Rolls:
        """Launches what the schedule can launch; never blocks the host after the first use.

        `batch`: this rank's tensors by name, all of one shape [B, local_len] (or [local_len]) and on one
        device; int32, int64, bool, float32 or bfloat16. All ranks of the cp group call this in the same order
        with the same layout. Communicates as the schedule does. At first use, and whenever names, dtypes, batch
        size or kind of layout change, the ranks also agree on them (blocking: alternate between two rollers
        rather than between two kinds), and all raise ValueError where they differ; at first use also where one
        of them was given something illegal.
        """
        if self._closed:
            raise RuntimeError("this roller is closed")
        kind = _kind_of(batch, layout)
        if self._current is None or self._signatures.get(kind) != self._current:
            self._signatures[kind] = self._current = self._check_and_agree(batch, layout)
        # Sorted: the wire has no names, so that all ranks must have them in one order.
        tensors = {
            name: batch[name].detach() if batch[name].requires_grad else batch[name] for name in sorted(batch)
        }
        return self._start(tensors, layout)

    def _check_and_agree(self, batch: Batch, layout: SequenceLayout) -> Signature:
        """Checks a batch of another kind than the last one's; where its signature is another, collectively."""
        signature, error = None, None
        try:
            signature = self._signature(batch, layout)
        except ValueError as illegal:
            if self._current is not None:
                raise
            error = str(illegal)
        if signature is None or signature != self._current:
            self._agree(signature, error)
        assert signature is not None
        return signature

    @abstractmethod
    def _start(self, batch: dict[str, torch.Tensor], layout: SequenceLayout) -> Rolls: ...

    def close(self) -> None:
        """Lets the buffers go. The exchange group stays, for the next roller of the same cp group."""
        self._closed = True

    def check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.num_depths:
            raise ValueError(f"depth must be in [1, {self.num_depths}] (num_depths), got {depth}")

    def _signature(self, batch: Batch, layout: SequenceLayout) -> Signature:
        check_batch(batch, layout, self._channel)
        self._check_names(batch)
        if layout.is_packed and layout.num_documents > self.max_documents:
            raise ValueError(
                f"the layout has {layout.num_documents} documents, more than max_documents "
                f"{self.max_documents}: pass a larger max_documents to make_roller"
            )
        # A packed stream's length may change from batch to batch: no message length depends on it.
        length = "" if layout.is_packed else str(layout.seq_len)
        rows = next(iter(batch.values())).shape[:-1]
        return Signature(
            self.name,
            self.num_depths,
            self.max_documents,
            f"{'packed' if layout.is_packed else 'dense'} {layout.kind} {length}".rstrip(),
            tuple(sorted(f"{name} {str(t.dtype)[6:]} {list(rows)}" for name, t in batch.items())),
        )

    def _check_names(self, batch: Batch) -> None:  # noqa: B027 - most schedules have nothing to check
        """Raises ValueError where the schedule needs tensors that the batch lacks."""

    def _agree(self, signature: Signature | None, error: str | None) -> None:
        """Collective, whenever the signature changes: all ranks learn what each has, and all raise or none."""
        everyone: list[tuple[Signature | None, str | None]] = [(signature, error)]
        if self._channel.cp_size > 1:
            everyone *= self._channel.cp_size
            with self._channel.named_errors(f"the agreement before the first exchange of {self.name!r}"):
                dist.all_gather_object(everyone, (signature, error), group=self._channel.group)
        errors = [f"cp rank {rank}: {one[1]}" for rank, one in enumerate(everyone) if one[1] is not None]
        if errors:
            raise ValueError("; ".join(errors))
        disagreements = _differences([one[0] for one in everyone if one[0] is not None])
        if disagreements:
            raise ValueError("the ranks of a cp group must start alike: " + "; ".join(disagreements))


def _kind_of(batch: Batch, layout: SequenceLayout) -> Hashable:
    """All that the checks look at: a batch of a kind that passed them needs no second look. None: not tensors."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in batch.values()):
        return None
    tensors = tuple((name, t.dtype, t.shape, t.device) for name, t in batch.items())
    return tensors, layout.is_packed, layout.kind, layout.cp_size, layout.seq_len, layout.num_documents


def check_batch(batch: Batch, layout: SequenceLayout, channel: Channel) -> None:
    """Raises ValueError unless `batch` holds tensors that can be rolled together over this channel."""
    if not batch:
        raise ValueError("the batch must hold at least one tensor, got none")
    if layout.cp_size != channel.cp_size:
        raise ValueError(
            f"the layout is for cp_size {layout.cp_size}, the cp group has {channel.cp_size} ranks: make the "
            "layout with the group's size"
        )
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    first_name, first = next(iter(batch.items()))
    for name, tensor in batch.items():
        if tensor.dtype not in INTEGER_VIEW:
            legal = ", ".join(str(dtype)[6:] for dtype in INTEGER_VIEW)
            raise ValueError(f"{name} must be one of {legal}, got {str(tensor.dtype)[6:]}: convert it first")
        if tensor.ndim < 1 or tensor.shape[-1] != layout.local_len:
            raise ValueError(
                f"{name} must have the layout's local length {layout.local_len} as its last dimension, got shape "
                f"{list(tensor.shape)}: pass this rank's shard, layout.shard(tensor, cp_rank)"
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"all tensors must have one shape, got {first_name} {list(first.shape)} and {name} "
                f"{list(tensor.shape)}"
            )
        if tensor.device != first.device or (
            channel.cp_size > 1 and tensor.device.type != channel.device_type
        ):
            raise ValueError(
                f"{name} must be on one {channel.device_type} device with the other tensors, which is where the "
                f"cp group communicates, got {tensor.device}: move it there"
            )
    if first.numel() == 0:
        raise ValueError(f"the batch must have at least one row, got shape {list(first.shape)}")


def _differences(signatures: list[Signature]) -> list[str]:
    lines = []
    for name in Signature.__dataclass_fields__:
        values = [getattr(one, name) for one in signatures]
        if len(set(values)) > 1:
            lines.append(
                f"{name}: " + ", ".join(f"cp rank {rank} has {value}" for rank, value in enumerate(values))
            )
    return lines
