"""The identity of a batch of activations: what the ranks agree on, and the key of a transport."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from overlap_mtp.device_layout import Layout
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.spec import (
    Batch,
    RollOptions,
    check_device,
    check_documents,
    check_tensors,
    refuse_wrapper,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes that a row is a multiple of: kernels read and write as many at once


class RowSpec(NamedTuple):
    """Everything that fixes the exchanges of a kind of activations, except the documents' bounds."""

    schedule: str
    transport: str
    num_depths: int
    max_documents: int
    layout_kind: str
    is_packed: bool
    seq_len: int  # 0 if packed: no message length depends on it
    names: tuple[str, ...]  # sorted
    dtype: torch.dtype
    shapes: tuple[torch.Size, ...]  # without the sequence dimension
    seq_dim: int
    tp_size: int
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
        seq_dim: int,
        tp_size: int,
    ) -> RowSpec:
        """Make the spec of a batch.

        Args:
            batch: this rank's activations by name.
            layout: of the batch.
            group: that will carry it.
            schedule, transport: their names.
            options: of the roller.
            seq_dim: the sequence dimension of all tensors.
            tp_size: how many ranks share the rows of a cp rank.

        Returns:
            The spec.

        Raises:
            ValueError: if the tensors do not fit the layout or one another.
        """
        check_activations(batch, layout, group, seq_dim, tp_size)
        check_documents(layout, options.max_documents)
        names = tuple(sorted(batch))
        first = batch[names[0]]
        whole = [batch[name].shape for name in names]
        shapes = tuple(torch.Size([*shape[:seq_dim], *shape[seq_dim + 1 :]]) for shape in whole)
        of_layout = (layout.kind, layout.is_packed, 0 if layout.is_packed else layout.seq_len)
        asked = (schedule, transport, options.num_depths, options.max_documents)
        return cls(*asked, *of_layout, names, first.dtype, shapes, seq_dim, tp_size, first.device)

    def describe(self) -> dict[str, object]:
        """The fields that all ranks must share, as text for error messages."""
        length = "" if self.is_packed else f" {self.seq_len}"
        return {
            "schedule": self.schedule,
            "transport": self.transport,
            "num_depths": self.num_depths,
            "max_documents": self.max_documents,
            "layout": f"{'packed' if self.is_packed else 'dense'} {self.layout_kind}{length}",
            "activations": tuple(
                f"{name} {str(self.dtype)[6:]} {list(shape)}"
                for name, shape in zip(self.names, self.shapes, strict=True)
            ),
            "seq_dim": self.seq_dim,
            "tp_size": self.tp_size,
        }

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor in a row."""
        return [prod(shape) for shape in self.shapes]

    @property
    def elements(self) -> int:
        """Elements of a row, with filler up to a multiple of ALIGNMENT bytes."""
        in_alignment = ALIGNMENT // self.dtype.itemsize
        return -(-sum(self.sizes) // in_alignment) * in_alignment

    @property
    def words_per_token(self) -> int:
        """int64 words of a row."""
        return self.elements * self.dtype.itemsize // 8

    def zeros(self, local_len: int) -> list[torch.Tensor]:
        """Activations of this kind for `local_len` tokens a cp rank, all 0."""
        held = local_len // self.tp_size
        shapes = [(*shape[: self.seq_dim], held, *shape[self.seq_dim :]) for shape in self.shapes]
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether kernels can read a tensor from its address on, 16 bytes at a time."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy for kernels to read."""
    return tensor if is_plain(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def check_activations(batch: Batch, layout: Layout, group: ExchangeGroup, seq_dim: int, tp_size: int) -> None:
    """Raise ValueError unless `batch` holds activations that can be rolled together over this group."""
    check_tensors(batch, layout, group)
    if layout.local_len % tp_size:
        raise ValueError(
            f"the tokens of a cp rank must be a multiple of the tp group's {tp_size} ranks, which share them, got "
            f"{layout.local_len}"
        )
    held, first = layout.local_len // tp_size, next(iter(batch.values()))
    for name, tensor in batch.items():
        if hasattr(tensor, "to_local"):  # detach() makes other wrappers plain tensors
            refuse_wrapper(name, tensor)
        if tensor.dtype not in DTYPES:
            legal = ", ".join(str(dtype)[6:] for dtype in DTYPES)
            raise ValueError(f"{name} must be one of {legal}, got {str(tensor.dtype)[6:]}")
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"all activations of an exchange must have one dtype, got {str(first.dtype)[6:]} and "
                f"{str(tensor.dtype)[6:]} ({name}): start one exchange for each, by a roller for each"
            )
        if tensor.ndim not in (2, 3) or not 0 <= seq_dim < tensor.ndim - 1 or tensor.shape[seq_dim] != held:
            share = f", divided by the tp group's {tp_size} ranks" if tp_size > 1 else ""
            first_fits = seq_dim == 1 and tensor.ndim in (2, 3) and tensor.shape[0] == held
            hint = ": for [L, B, H] or [L, H] make the roller with seq_dim=0" if first_fits else ""
            raise ValueError(
                f"dimension {seq_dim} (seq_dim) of {name} must be the layout's local length {layout.local_len}{share}, "
                f"and its last dimension the hidden one, got shape {list(tensor.shape)}{hint}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")
        check_device(name, tensor, first, group)
