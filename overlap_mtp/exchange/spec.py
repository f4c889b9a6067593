"""The identity of a batch: what the ranks agree on, the key of a transport, and the source of the kernels' table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.layout import IntArray, SequenceLayout
from overlap_mtp.tensors import IGNORE_INDEX, INTEGER_VIEW

Batch = Mapping[str, torch.Tensor]


def fill_of(name: str, ignore_index: int = IGNORE_INDEX) -> int:
    """What a rolled tensor holds past the end of a document.

    It is `ignore_index` for `labels` (no label), 1 (True) for `padding_mask` (padding), and 0 for all others.
    """
    return {"labels": ignore_index, "padding_mask": 1}.get(name, 0)


def check_fill(name: str, dtype: torch.dtype, ignore_index: int) -> None:
    """Raise ValueError unless the fill of a tensor is a value of its dtype."""
    fill = fill_of(name, ignore_index)
    if torch.tensor(fill).to(dtype).item() != fill:
        raise ValueError(
            f"{name} of dtype {str(dtype)[6:]} cannot hold {fill}, which stands for what is past the end of a "
            f"document: convert {name} to int64, or choose another ignore_index"
        )


@lru_cache
def _bits(value: int, dtype: torch.dtype) -> int:
    """The bits of a value as an integer of the dtype's width."""
    return int(torch.tensor([value]).to(dtype).view(INTEGER_VIEW[dtype]))


class ExchangeSpec(NamedTuple):
    """Everything that fixes the exchanges of a kind of batch, except the documents' bounds.

    Two batches of one spec use the same messages. Making one takes a few microseconds, so it is made for each batch.
    """

    schedule: str
    transport: str  # as asked for
    num_depths: int
    max_documents: int
    layout_kind: str
    is_packed: bool
    seq_len: int  # 0 if packed: no message length depends on it
    names: tuple[str, ...]  # sorted: the messages hold no names
    dtypes: tuple[torch.dtype, ...]
    batch_shape: torch.Size  # [B], or [] for 1-D tensors
    device: torch.device
    ignore_index: int = IGNORE_INDEX

    @classmethod
    def of(
        cls,
        batch: Batch,
        layout: SequenceLayout,
        group: ExchangeGroup,
        schedule: str,
        transport: str,
        num_depths: int,
        max_documents: int,
        ignore_index: int = IGNORE_INDEX,
    ) -> ExchangeSpec:
        """Make the spec of a batch.

        Args:
            batch: this rank's tensors by name, [B, local_len] or [local_len] each.
            layout: of the batch.
            group: that will carry it.
            schedule: name of the schedule.
            transport: as asked for.
            num_depths: of the roller.
            max_documents: of the roller.
            ignore_index: of the roller.

        Returns:
            The spec.

        Raises:
            ValueError: if the tensors do not fit the layout or one another.
        """
        try:
            names = tuple(sorted(batch))
            tensors = [batch[name] for name in names]
            shapes = [tensor.shape for tensor in tensors]
            devices = [tensor.device for tensor in tensors]
            dtypes = tuple([tensor.dtype for tensor in tensors])
            shape, device = shapes[0], devices[0]
            are_dense = [tensor.layout for tensor in tensors].count(torch.strided) == len(tensors)
            are_alike = shapes.count(shape) == len(shapes) == devices.count(device)
            fit_layout = shape and shape[-1] == layout.local_len and layout.cp_size == group.cp_size
        except Exception:
            check_batch(batch, layout, group, ignore_index)
            raise
        if not (are_dense and are_alike and fit_layout):
            check_batch(batch, layout, group, ignore_index)
        if layout.num_documents > max_documents < layout.num_used_documents:
            raise ValueError(
                f"the layout has {layout.num_used_documents} documents, more than max_documents {max_documents}: "
                "pass a larger max_documents to make_roller"
            )
        asked = (schedule, transport, num_depths, max_documents)
        of_layout = (layout.kind, layout.is_packed, 0 if layout.is_packed else layout.seq_len)
        return cls(*asked, *of_layout, names, dtypes, shape[:-1], device, ignore_index)

    def describe(self) -> dict[str, object]:
        """The fields that all ranks must share, as text for error messages."""
        length = "" if self.is_packed else f" {self.seq_len}"
        tensors = zip(self.names, self.dtypes, strict=True)
        return {
            "schedule": self.schedule,
            "num_depths": self.num_depths,
            "max_documents": self.max_documents,
            "layout": f"{'packed' if self.is_packed else 'dense'} {self.layout_kind}{length}",
            "tensors": tuple(f"{name} {str(dtype)[6:]} {list(self.batch_shape)}" for name, dtype in tensors),
            "transport": self.transport,
            "ignore_index": self.ignore_index,
        }

    @property
    def batch_rows(self) -> int:
        """B."""
        return prod(self.batch_shape)

    @property
    def words_per_token(self) -> int:
        """int64 words that a token takes in a message: one for each tensor and batch row."""
        return len(self.names) * self.batch_rows

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of an element of each tensor."""
        return tuple(dtype.itemsize for dtype in self.dtypes)

    @property
    def fills(self) -> tuple[int, ...]:
        """For each tensor, what a token past its document's end becomes, as an integer of the tensor's width."""
        pairs = zip(self.names, self.dtypes, strict=True)
        return tuple(_bits(fill_of(name, self.ignore_index), dtype) for name, dtype in pairs)

    @property
    def table(self) -> IntArray:
        """What the kernels have to know, int64 [2, tensors]: widths and fills."""
        return np.array([self.widths, self.fills])

    def as_integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """A [B, L] view as integers of the same width."""
        return tensor.view(INTEGER_VIEW[tensor.dtype]).view(self.batch_rows, -1)


def check_batch(
    batch: Batch, layout: SequenceLayout, group: ExchangeGroup, ignore_index: int = IGNORE_INDEX
) -> None:
    """Raise ValueError unless `batch` holds tensors that can be rolled together over this group."""
    if not isinstance(layout, SequenceLayout):
        raise ValueError(f"the layout must be a SequenceLayout, got {type(layout).__name__}")
    if not isinstance(batch, Mapping) or not batch:
        got = "none" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"the batch must be a dict and hold at least one tensor, got {got}")
    if layout.cp_size != group.cp_size:
        raise ValueError(
            f"the layout is for cp_size {layout.cp_size}, the cp group has {group.cp_size} ranks: make the layout "
            "with the group's size"
        )
    for name, tensor in batch.items():
        if not isinstance(name, str):
            raise ValueError(
                f"the names of tensors must be strings, got {name!r} of type {type(name).__name__}"
            )
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
            kind = type(tensor).__name__
            if isinstance(tensor, torch.Tensor):
                kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
            raise ValueError(f"{name} must be a dense tensor, got {kind}")
    first_name, first = next(iter(batch.items()))
    for name, tensor in batch.items():
        if tensor.dtype not in INTEGER_VIEW:
            legal = ", ".join(str(dtype)[6:] for dtype in INTEGER_VIEW)
            like = "int64" if not (tensor.is_floating_point() or tensor.is_complex()) else "float32"
            advice = (
                "roll its real and its imaginary part" if tensor.is_complex() else f"convert it to {like}"
            )
            raise ValueError(f"{name} must be one of {legal}, got {str(tensor.dtype)[6:]}: {advice}")
        check_fill(name, tensor.dtype, ignore_index)
        if tensor.ndim < 1 or tensor.shape[-1] != layout.local_len:
            raise ValueError(
                f"{name} must have the layout's local length {layout.local_len} as its last dimension, got shape "
                f"{list(tensor.shape)}: pass this rank's shard, layout.shard(tensor, cp_rank), and this batch's layout"
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"all tensors must have one shape, got {first_name} {list(first.shape)} and {name} "
                f"{list(tensor.shape)}"
            )
        if tensor.device != first.device or (group.cp_size > 1 and tensor.device.type != group.device_type):
            raise ValueError(
                f"all tensors must be on one {group.device_type} device, where the cp group communicates, got {name} "
                f"on {tensor.device}: move it there"
            )
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        raise ValueError(
            f"the batch must be on the current device cuda:{torch.cuda.current_device()}, got {first.device}: call "
            "torch.cuda.set_device"
        )
    if first.numel() == 0:
        raise ValueError(f"the batch must have at least one row, got shape {list(first.shape)}")
