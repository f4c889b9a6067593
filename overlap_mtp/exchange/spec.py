"""What one exchange carries: which tensors, as what integers, and where their rolls go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch

from overlap_mtp.layout import IntArray
from overlap_mtp.tensors import INTEGER_VIEW

FILL_IS_ONE = frozenset({"padding_mask"})  # where a token is missing, it is padding
_ONE = {dtype: int(torch.ones(1, dtype=dtype).view(view)) for dtype, view in INTEGER_VIEW.items()}


def fill_of(name: str) -> int:
    """What a rolled tensor holds past the end of a document: 0, or 1 (True) for `padding_mask`."""
    return 1 if name in FILL_IS_ONE else 0


@dataclass(frozen=True)
class Outputs:
    """Freshly allocated rolls: by depth and name, and the same memory by tensor for what writes it."""

    depths: list[dict[str, torch.Tensor]]  # [num_depths], each tensor of the batch's shape
    bases: list[int]  # per tensor, the address of its roll of depth 1


@dataclass(frozen=True)
class Cargo:
    """The names (sorted: the wire has none), dtypes and leading dimensions of the tensors of a batch."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    leading: torch.Size  # [B], or [] for 1-D tensors
    device: torch.device

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> Cargo:
        names = tuple(sorted(batch))
        first = batch[names[0]]
        return cls(names, tuple(batch[name].dtype for name in names), first.shape[:-1], first.device)

    @cached_property
    def rows(self) -> int:
        """B."""
        return prod(self.leading)

    @cached_property
    def words(self) -> int:
        """int64 words that a token takes on the wire: one per tensor and batch row."""
        return len(self.names) * self.rows

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bytes of an element of each tensor."""
        return tuple(dtype.itemsize for dtype in self.dtypes)

    @cached_property
    def fills(self) -> tuple[int, ...]:
        """What a token past its document's end becomes, as an integer of the tensor's width."""
        return tuple(
            _ONE[dtype] if fill_of(name) else 0 for name, dtype in zip(self.names, self.dtypes, strict=True)
        )

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The tensors (by number) of each dtype: their rolls share one allocation, [num_depths, tensors, B, L]."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for number, dtype in enumerate(self.dtypes):
            by_dtype.setdefault(dtype, []).append(number)
        return tuple(tuple(numbers) for numbers in by_dtype.values())

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """How many tensors share the allocation of each tensor's rolls."""
        sizes = {number: len(numbers) for numbers in self.groups for number in numbers}
        return tuple(sizes[number] for number in range(len(self.names)))

    @cached_property
    def table(self) -> IntArray:
        """What kernels have to know, int64 [3, tensors]: widths, fills and group sizes."""
        return np.array([self.widths, self.fills, self.group_sizes])

    def tensors(self, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The batch's tensors in the order of `names`, contiguous."""
        return [
            tensor if tensor.is_contiguous() else tensor.contiguous()
            for tensor in [batch[name] for name in self.names]
        ]

    def outputs(
        self, tensors: list[torch.Tensor], num_depths: int, length: int, ahead: int = 1
    ) -> list[Outputs]:
        """Room for the rolls of `ahead` microbatches of `tensors`, `length` tokens each: one allocation per dtype."""
        made = [Outputs([{} for _ in range(num_depths)], [0] * len(self.names)) for _ in range(ahead)]
        for numbers in self.groups:
            count, width = len(numbers), self.widths[numbers[0]]
            with torch.inference_mode(False):
                room = tensors[numbers[0]].new_empty((ahead * num_depths * count, *self.leading, length))
                # Each with a version counter of its own: a write to one is none to the others.
                rolls = iter([one.data for one in room.unbind(0)])
            address, step = room.data_ptr(), self.rows * length * width
            for outputs in made:
                for index, number in enumerate(numbers):
                    outputs.bases[number] = address + index * step
                for rolled in outputs.depths:
                    for number in numbers:
                        rolled[self.names[number]] = next(rolls)
                address += num_depths * count * step
        return made

    def bytes_of_rolls(self, num_depths: int, length: int) -> int:
        """Bytes of the rolls of one microbatch."""
        return num_depths * self.rows * length * sum(self.widths)

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, L] view as integers of the same width."""
        return tensor.view(INTEGER_VIEW[tensor.dtype]).view(self.rows, -1)
