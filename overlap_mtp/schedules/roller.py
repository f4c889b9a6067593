"""The interface that all schedules share, and the checks that come before any message leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.transport import Traffic
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tensors import INTEGER_VIEW

Batch = Mapping[str, torch.Tensor]
Roll = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


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

    def set_replay_layout(self, layout: SequenceLayout) -> None:
        """For exchanges that were captured in a CUDA graph: the layout of the replays to come.

        A copy on the current stream, without waiting for the device. Same length, at most max_documents documents.
        Raises RuntimeError where nothing was captured, and ValueError for another kind of layout or another length.
        """
        raise RuntimeError(
            "only rolls with an exchange that was captured in a CUDA graph take another layout"
        )


def detached(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch, outside of any autograd graph, in the order that all ranks have in common."""
    return {
        name: batch[name].detach() if batch[name].requires_grad else batch[name] for name in sorted(batch)
    }


@dataclass(frozen=True)
class Signature:
    """What the ranks of a cp group must have in common before a message may leave."""

    schedule: str
    num_depths: int
    max_documents: int
    layout: str
    tensors: tuple[str, ...]  # "name dtype shape" each, sorted
    transport: str  # as asked for


class ChainedRolls(Rolls):
    """Depth k + 1 is depth k rolled by one, when it is asked for."""

    def __init__(self, roller: Roller, batch: dict[str, torch.Tensor], roll: Roll) -> None:
        self._roller = roller
        self._roll = roll
        self._rolled = [batch]  # by depth, the batch itself at 0

    def at(self, depth: int) -> dict[str, torch.Tensor]:
        self._roller.check_depth(depth)
        while len(self._rolled) <= depth:
            self._rolled.append(self._roll(self._rolled[-1]))
        return dict(self._rolled[depth])


class Roller(ABC):
    """Rolls the tensors of microbatch after microbatch by one schedule. Made by `make_roller`."""

    name: str
    overlapped = False  # whether its exchanges run beside the current stream
    _wanted = ""  # the transport that was asked for

    def __init__(self, group: ExchangeGroup, num_depths: int, max_documents: int) -> None:
        self.num_depths = num_depths
        self.max_documents = max_documents
        self.traffic = Traffic()
        self._group = group
        self._current: Signature | None = None  # what all ranks agreed on last
        self._kind: Hashable = None  # of the last batch that passed all checks
        self._closed = False

    def start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None = None) -> Rolls:
        """Launches what the schedule can launch; never blocks the host after the first use.

        `batch`: this rank's tensors by name, all of one shape [B, local_len] (or [local_len]) and on one device;
        int32, int64, bool, float32 or bfloat16. `ready`: a CUDA event from which on the batch may be read; by
        default, all that the current stream has been given. An earlier one lets an overlapped exchange begin in the
        midst of a long kernel rather than between two. One stream at a time uses a roller, or streams that wait for
        one another, and no exchange is under way beside a replay of one that was captured. All ranks of the cp group
        call this in the same order with the same layout. Communicates as the schedule does. At first use, and
        whenever names, dtypes, batch size or kind of layout change, the ranks also agree on them (blocking: alternate
        between two rollers rather than between two kinds), and all raise ValueError where they differ; at first use
        also where one of them was given something illegal.
        """
        self.check_open()
        if ready is not None and not self.overlapped:
            torch.cuda.current_stream().wait_event(ready)
        kind = _kind_of(batch, layout)
        if kind != self._kind or layout.num_documents > self.max_documents:
            self._kind = None
            self._admit(batch, layout)
            self._kind = kind
        return self._start(batch, layout, ready)

    def _admit(self, batch: Batch, layout: SequenceLayout) -> None:
        """Checks a batch of another kind than the last. At first use an error here is one on all ranks."""
        try:
            signature = self._signature(batch, layout)
        except Exception as error:
            if self._current is None:
                self._agree(None, str(error))
            raise
        if signature != self._current:
            self._agree(signature, None)

    @property
    def transport(self) -> str:
        """What its tokens travel by, as far as that has been settled; "" where none do."""
        return ""

    @abstractmethod
    def _start(self, batch: Batch, layout: SequenceLayout, ready: torch.cuda.Event | None) -> Rolls: ...

    def check(self) -> None:  # noqa: B027 - most schedules find out when they roll
        """Raises RuntimeError if a peer was found late, or to roll by another layout. Never waits.

        `start` and `at` do the same. Replays of a CUDA graph call neither: call this every now and then.
        """

    def close(self) -> None:
        """Lets the buffers go, when the device is done with them. The exchange group stays, for the next roller.

        Raises what `check` does.
        """
        self._closed = True

    def check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this roller is closed")

    def check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.num_depths:
            raise ValueError(f"depth must be in [1, {self.num_depths}] (num_depths), got {depth}")

    def _signature(self, batch: Batch, layout: SequenceLayout) -> Signature:
        check_batch(batch, layout, self._group)
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
            self._wanted,
        )

    def _check_names(self, batch: Batch) -> None:  # noqa: B027 - most schedules have nothing to check
        """Raises ValueError where the schedule needs tensors that the batch lacks."""

    def _agree(self, signature: Signature | None, error: str | None) -> None:
        """Collective, whenever the signature changes: all ranks learn what each has, and all raise or none."""
        everyone: list[tuple[Signature | None, str | None]] = [(signature, error)] * self._group.cp_size
        if self._group.cp_size > 1:
            with self._group.named_errors(f"the agreement before the first exchange of {self.name!r}"):
                dist.all_gather_object(everyone, (signature, error), group=self._group.group)
        errors = [f"cp rank {rank}: {one}" for rank, (_, one) in enumerate(everyone) if one is not None]
        if errors:
            raise ValueError("; ".join(errors))
        disagreements = _differences([one for one, _ in everyone if one is not None])
        if disagreements:
            raise ValueError("the ranks of a cp group must start alike: " + "; ".join(disagreements))
        self._current = signature


def _kind_of(batch: Batch, layout: SequenceLayout) -> Hashable:
    """All that the checks look at: a batch of a kind that passed them needs no second look."""
    try:
        tensors = tuple([(name, t.dtype, t.shape, t.device) for name, t in batch.items()])
    except AttributeError:
        return object()  # not tensors: the checks will say so
    return tensors, layout.is_packed, layout.kind, layout.cp_size, layout.seq_len


def check_batch(batch: Batch, layout: SequenceLayout, group: ExchangeGroup) -> None:
    """Raises ValueError unless `batch` holds tensors that can be rolled together over this group."""
    if not isinstance(batch, Mapping) or not batch:
        raise ValueError("the batch must be a dict and hold at least one tensor, got none")
    if layout.cp_size != group.cp_size:
        raise ValueError(
            f"the layout is for cp_size {layout.cp_size}, the cp group has {group.cp_size} ranks: make the "
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
        if tensor.device != first.device or (group.cp_size > 1 and tensor.device.type != group.device_type):
            raise ValueError(
                f"{name} must be on one {group.device_type} device with the other tensors, which is where the "
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
