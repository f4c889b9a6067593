"""The identity of a batch: what the ranks agree on, the key of a transport, and the source of the kernels' table."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import torch

from overlap_mtp.device_layout import DeviceLayout, Layout
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.layout import IntArray
from overlap_mtp.tensors import IGNORE_INDEX, INTEGER_VIEW

Batch = Mapping[str, torch.Tensor]


def fills_of(ignore_index: int = IGNORE_INDEX, fills: Mapping[str, float] | None = None) -> dict[str, float]:
    """What rolled tensors hold past the end of a document, by name. A tensor without an entry holds 0.

    By default it is `ignore_index` for `labels` (no label) and 1 (True) for `padding_mask` (padding).
    """
    return {"labels": ignore_index, "padding_mask": 1, **(fills or {})}


def check_fill(name: str, dtype: torch.dtype, fill: float) -> None:
    """Raise ValueError unless the fill of a tensor is a value of its dtype."""
    if _scalar(fill, dtype).item() != fill:
        advice = "convert labels to int64, or choose another ignore_index"
        raise ValueError(
            f"{name} of dtype {str(dtype)[6:]} cannot hold {fill}, which stands for what is past the end of a "
            f"document: {advice if name == 'labels' else 'choose another fill'}"
        )


@dataclass(frozen=True)
class RollOptions:
    """What a roller does with each batch (`make_roller`)."""

    num_depths: int
    max_documents: int
    fills: Mapping[str, float]  # by name; 0 for others
    depths: Mapping[str, int]  # by name; num_depths for others


def roll_options(
    num_depths: int,
    max_documents: int,
    ignore_index: int,
    fills: Mapping[str, float] | None,
    depths: Mapping[str, int] | None,
) -> RollOptions:
    """Check the arguments of `make_roller` of these names, and collect them.

    Raises:
        ValueError: if one of them is out of range.
    """
    if operator.index(num_depths) < 1:
        raise ValueError(f"num_depths must be >= 1, got {num_depths}")
    if max_documents < 1:
        raise ValueError(f"max_documents must be >= 1, got {max_documents}")
    if not -(2**63) <= operator.index(ignore_index) < 2**63:
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index}")
    for name, fill in (fills or {}).items():
        if fill != fill:
            raise ValueError(f"the fill of {name} must be a number, got {fill}")
    for name, own in (depths or {}).items():
        if not 1 <= operator.index(own) <= num_depths:
            raise ValueError(f"the depths of {name} must be in [1, {num_depths}] (num_depths), got {own}")
    return RollOptions(num_depths, max_documents, fills_of(ignore_index, fills), dict(depths or {}))


def _bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a value as an integer of the dtype's width."""
    return int(_scalar(value, dtype).view(INTEGER_VIEW[dtype]))


def _scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A value as a tensor, whatever the default dtype is: a float has 64 bits."""
    wide = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=wide, device="cpu").to(dtype)


class ExchangeSpec(NamedTuple):
    """Everything that fixes the exchanges of a kind of batch, except the documents' bounds.

    Two batches of one spec use the same messages.
    """

    schedule: str
    transport: str  # as asked for
    num_depths: int
    max_documents: int
    layout_kind: str
    is_packed: bool
    seq_len: int  # 0 if packed: no message length depends on it
    bounds_on_device: bool  # a DeviceLayout, whose bounds the kernels read
    names: tuple[str, ...]  # sorted: the messages hold no names
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]  # without the last dimension: [B], or [] for 1-D tensors, ...
    fills: tuple[float, ...]
    depths: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(
        cls,
        batch: Batch,
        layout: Layout,
        group: ExchangeGroup,
        schedule: str,
        transport: str,
        options: RollOptions,
    ) -> ExchangeSpec:
        """Make the spec of a batch.

        Args:
            batch: this rank's tensors by name, [..., local_len] each.
            layout: of the batch.
            group: that will carry it.
            schedule: name of the schedule.
            transport: as asked for.
            options: of the roller.

        Returns:
            The spec.

        Raises:
            ValueError: if the tensors do not fit the layout or one another.
        """
        check_batch(batch, layout, group, options.fills)
        check_documents(layout, options.max_documents)
        names = tuple(sorted(batch))
        tensors = [batch[name] for name in names]
        asked = (schedule, transport, options.num_depths, options.max_documents)
        of_layout = (layout.kind, layout.is_packed, 0 if layout.is_packed else layout.seq_len)
        dtypes, leading = tuple(one.dtype for one in tensors), tuple(one.shape[:-1] for one in tensors)
        fills = tuple(options.fills.get(name, 0) for name in names)
        depths = tuple(options.depths.get(name, options.num_depths) for name in names)
        on_device, device = isinstance(layout, DeviceLayout), tensors[0].device
        return cls(*asked, *of_layout, on_device, names, dtypes, leading, fills, depths, device)

    def describe(self) -> dict[str, object]:
        """The fields that all ranks must share, as text for error messages."""
        length = "" if self.is_packed else f" {self.seq_len}"
        where = " on the device" if self.bounds_on_device else ""
        tensors = zip(self.names, self.dtypes, self.shapes, strict=True)
        return {
            "schedule": self.schedule,
            "num_depths": self.num_depths,
            "max_documents": self.max_documents,
            "layout": f"{'packed' if self.is_packed else 'dense'} {self.layout_kind}{length}{where}",
            "tensors": tuple(f"{name} {str(dtype)[6:]} {list(shape)}" for name, dtype, shape in tensors),
            "transport": self.transport,
            "fills (of labels: ignore_index)": self.fills,
            "depths of the tensors": self.depths,
        }

    # In messages and kernels, tensors are split into columns of equally many rows, so that tensors of different
    # leading shapes travel together: [B, L] and [3, B, L] are one column and three.

    @property
    def batch_rows(self) -> int:
        """Rows of a column: B, if all tensors are [B, L]."""
        return gcd(*(prod(shape) for shape in self.shapes))

    @property
    def parts(self) -> tuple[int, ...]:
        """Columns of each tensor."""
        rows = self.batch_rows
        return tuple(prod(shape) // rows for shape in self.shapes)

    @property
    def num_columns(self) -> int:
        return sum(self.parts)

    @property
    def words_per_token(self) -> int:
        """int64 words that a token takes in a message: one for each row of each tensor."""
        return self.num_columns * self.batch_rows

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of an element of each column."""
        return self._by_column([dtype.itemsize for dtype in self.dtypes])

    @property
    def fill_bits(self) -> tuple[int, ...]:
        """For each column, what a token past its document's end becomes, as an integer of the column's width."""
        return self._by_column([_bits(*one) for one in zip(self.fills, self.dtypes, strict=True)])

    @property
    def table(self) -> IntArray:
        """What the kernels have to know, int64 [2, columns]: widths and fills."""
        return np.array([self.widths, self.fill_bits])

    def _by_column(self, values: list[int]) -> tuple[int, ...]:
        return tuple(value for value, parts in zip(values, self.parts, strict=True) for _ in range(parts))

    def zeros(self, local_len: int) -> list[torch.Tensor]:
        """Tensors of this kind for `local_len` tokens a rank, all 0."""
        kinds = zip(self.shapes, self.dtypes, strict=True)
        return [torch.zeros((*shape, local_len), dtype=dtype, device=self.device) for shape, dtype in kinds]

    def columns(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views [batch_rows, L] of the tensors as integers of their own width, one for each column."""
        rows = self.batch_rows
        return [
            column
            for tensor in tensors
            for column in tensor.view(INTEGER_VIEW[tensor.dtype]).view(-1, rows, tensor.shape[-1]).unbind(0)
        ]


def column_addresses(tensors: Sequence[torch.Tensor | None], parts: tuple[int, ...]) -> list[int]:
    """The address of each column, given the columns of each tensor; 0 for those of a tensor that is None."""
    addresses = []
    for tensor, columns in zip(tensors, parts, strict=True):
        if tensor is None:
            addresses += [0] * columns
        elif columns == 1:
            addresses.append(tensor.data_ptr())
        else:
            first, step = tensor.data_ptr(), tensor.nbytes // columns
            addresses += [first + part * step for part in range(columns)]
    return addresses


def check_documents(layout: Layout, max_documents: int) -> None:
    """Raise ValueError if a layout has more documents than the roller's messages hold."""
    if layout.num_documents > max_documents < layout.num_used_documents:
        raise ValueError(
            f"the layout has {layout.num_used_documents} documents, more than max_documents {max_documents}: "
            "make the roller with a larger max_documents"
        )


def check_tensors(batch: Batch, layout: Layout, group: ExchangeGroup) -> None:
    """Raise ValueError unless `batch` holds dense tensors by name, and the layout is one for this group."""
    if not isinstance(layout, Layout):
        raise ValueError(
            f"the layout must be a SequenceLayout or a DeviceLayout, got {type(layout).__name__}"
        )
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


def wraps(tensor: torch.Tensor) -> bool:
    """Whether it only wraps other tensors, as a DTensor does: it has no memory of its own."""
    return hasattr(tensor, "__tensor_flatten__")


def refuse_wrapper(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a tensor that wraps others."""
    kind = type(tensor).__name__
    raise ValueError(f"{name} is a {kind}: pass a plain tensor of this rank (a DTensor's is its to_local())")


def check_device(name: str, tensor: torch.Tensor, first: torch.Tensor, group: ExchangeGroup) -> None:
    """Raise ValueError unless a tensor is on the device of the first one, where the group communicates."""
    if tensor.device != first.device or (group.cp_size > 1 and tensor.device.type != group.device_type):
        raise ValueError(
            f"all tensors must be on one {group.device_type} device, where the cp group communicates, got {name} "
            f"on {tensor.device}: move it there"
        )
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        raise ValueError(
            f"the batch must be on the current device cuda:{torch.cuda.current_device()}, got {tensor.device}: call "
            "torch.cuda.set_device"
        )


def check_batch(batch: Batch, layout: Layout, group: ExchangeGroup, fills: Mapping[str, float]) -> None:
    """Raise ValueError unless `batch` holds tensors that can be rolled together over this group."""
    check_tensors(batch, layout, group)
    first = next(iter(batch.values()))
    for name, tensor in batch.items():
        if wraps(tensor):
            refuse_wrapper(name, tensor)
        if tensor.dtype not in INTEGER_VIEW:
            legal = ", ".join(str(dtype)[6:] for dtype in INTEGER_VIEW)
            like = "int64" if not (tensor.is_floating_point() or tensor.is_complex()) else "float32"
            advice = (
                "roll its real and its imaginary part" if tensor.is_complex() else f"convert it to {like}"
            )
            raise ValueError(f"{name} must be one of {legal}, got {str(tensor.dtype)[6:]}: {advice}")
        check_fill(name, tensor.dtype, fills.get(name, 0))
        if tensor.ndim < 1 or tensor.shape[-1] != layout.local_len:
            raise ValueError(
                f"{name} must have the layout's local length {layout.local_len} as its last dimension, got shape "
                f"{list(tensor.shape)}: pass this rank's shard, layout.shard(tensor, cp_rank), and this batch's layout"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} must have at least one row, got shape {list(tensor.shape)}")
        check_device(name, tensor, first, group)
    if isinstance(layout, DeviceLayout) and layout.cu_seqlens.device != first.device:
        raise ValueError(
            f"the bounds of a DeviceLayout must be on the batch's device {first.device}, got "
            f"{layout.cu_seqlens.device}: move them there, or pass DeviceLayout.on_host()"
        )
