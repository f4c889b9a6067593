"""The grid: which layouts, dtypes, shapes and depths a roll is tried on, and with which values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from overlap_mtp.layout import KINDS, Kind, SequenceLayout
from overlap_mtp.tensors import INTEGER_VIEW

MAX_DEPTH = 4
DTYPES = (
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
)

# How the documents are told to the roll: not at all (dense); the same bounds as cu_seqlens_q and cu_seqlens_q_padded;
# no cu_seqlens_q_padded; or the sums of the valid lengths as cu_seqlens_q.
Bounds = Literal["none", "same", "unpadded", "padded"]

# How the batches of a case follow each other: each is rolled after the one before; all are under way at once; or in
# turn, with the tokens of each written into the tensor that held those before.
Order = Literal["in turn", "in flight", "same input"]


@dataclass(frozen=True)
class Case:
    """Batches of one shape and dtype that are rolled by 1 .. num_depths, one batch after the other."""

    name: str
    layouts: tuple[SequenceLayout, ...]  # one for each batch
    num_depths: int = MAX_DEPTH
    dtype: torch.dtype = torch.int64
    rows: int | None = 2  # [rows, L], or [L] if None
    bounds: Bounds = "none"
    order: Order = "in turn"
    is_contiguous: bool = True  # whether the tensor that is rolled is contiguous in memory

    def full_tensor(self, batch: int) -> torch.Tensor:
        """The tensor of a batch before it is cut over the ranks, [rows, S] or [S]."""
        shape = (self.rows or 1, self.layouts[batch].seq_len)
        full = draw(shape, self.dtype, batch)
        return full if self.rows else full[0]


def draw(shape: tuple[int, int], dtype: torch.dtype, number: int) -> torch.Tensor:
    """Values that tell positions, rows and batches apart.

    Even draws count up, which is easy to read in a report. Odd draws hold random bits without NaN, so that a value that
    passed through another dtype shows. Draws of bool are random.
    """
    generator = torch.Generator().manual_seed(number)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if number % 2:
        integer = INTEGER_VIEW[dtype]
        info = torch.iinfo(integer)
        bits = torch.randint(info.min, info.max, shape, dtype=integer, generator=generator)
        values = bits.view(dtype)
        if dtype.is_floating_point:
            values = torch.where(values.isnan(), 1.5, values)
            values[..., 2::7] = -0.0
        return values
    count = torch.arange(shape[0] * shape[1]).view(shape) + 100_003 * number
    if dtype.itemsize < 4:
        count %= 251  # a prime; bfloat16 holds integers up to 256
    return (count + 1).to(dtype)


def cases_for(cp_size: int, quick: bool = False) -> list[Case]:
    """Make the grid for a number of ranks.

    Args:
        cp_size: how many ranks share the sequence.
        quick: leave out a third of them: other shapes, depths and dtypes, and layouts that take turns.

    Returns:
        The cases, the plainest first. Their names are unique.

    Raises:
        ValueError: if `cp_size` is below 1.
    """
    return [case for kind in KINDS for case in _cases_of(cast(Kind, kind), cp_size, quick)]


def _layouts(kind: Kind, cp_size: int) -> dict[str, tuple[SequenceLayout, Bounds]]:
    """Layouts of a kind by name, with how a roll is told of them. Lengths are in units of one token a chunk."""
    unit = 2 * cp_size

    def packed(bounds: list[int], valid: list[int] | None = None, **tail: Any) -> SequenceLayout:
        return SequenceLayout.packed(bounds, cp_size, kind, valid, **tail)

    def units(*bounds: int) -> list[int]:
        return [unit * bound for bound in bounds]

    layouts: dict[str, tuple[SequenceLayout, Bounds]] = {
        "dense": (SequenceLayout.dense(5 * unit, cp_size, kind), "none"),
        "dense, chunks of one token": (SequenceLayout.dense(unit, cp_size, kind), "none"),
        "packed": (packed(units(0, 2, 5, 9)), "same"),
        "padded": (packed(units(0, 4, 10, 18), [4 * unit - 3, 6 * unit - 2, 8 * unit - 1]), "padded"),
        "packed, no padded bounds": (packed(units(0, 3, 4, 9)), "unpadded"),
        "packed, one document": (packed(units(0, 4)), "same"),
        "packed, chunks of one token": (packed(units(*range(9))), "same"),
        "padded, half of it padding": (packed(units(0, 3, 8), [unit + 1, 2 * unit]), "padded"),
        "padded, short documents": (packed(units(0, 2, 4, 6, 8, 11), [1, 2, 3, unit, 4]), "padded"),
        "padded, documents without tokens": (packed(units(0, 2, 4, 7), [0, 2 * unit - 1, 0]), "padded"),
        "empty documents in the middle": (packed(units(0, 2, 2, 2, 5)), "same"),
        "empty documents at the ends": (packed(units(0, 0, 2, 5, 5, 5)), "same"),
        "padded, and empty documents": (
            packed(units(0, 0, 2, 2, 5, 5), [0, unit, 0, 3 * unit - 1, 0]),
            "padded",
        ),
        "many documents": (packed(units(*range(0, 48, 2))), "same"),
    }
    if kind != "zigzag":  # there each document is cut for itself
        odd = [0, 1, 3, unit + 2, unit + 3, 3 * unit + 1, 5 * unit]
        layouts["documents of any length"] = packed(odd), "same"
        layouts["padded, documents of any length"] = (
            packed(odd, [1, 1, unit - 2, 0, 2 * unit - 3, unit]),
            "padded",
        )
    layouts["a tail after the documents"] = packed(units(0, 2, 5), seq_len=7 * unit), "same"
    return layouts


def _cases_of(kind: Kind, cp_size: int, quick: bool) -> Iterator[Case]:
    layouts = _layouts(kind, cp_size)

    def case(which: str, what: str = "", *others: str, **fields: Any) -> Case:
        name = f"{kind}, {which}{', ' * bool(what)}{what}"
        all_layouts = tuple(layouts[one][0] for one in (which, *(others or [which])))
        return Case(name, all_layouts, bounds=layouts[which][1], **fields)

    for which in layouts:
        yield case(which)
    for dtype in DTYPES[1:]:
        yield case("packed", str(dtype)[6:], dtype=dtype)
    yield case("packed", "[L]", rows=None)
    yield case("padded", "two in flight", order="in flight")
    yield case("dense", "into the same tensor", order="same input")
    yield case("packed", "not contiguous in memory", is_contiguous=False)
    if quick:
        return
    for dtype in (torch.int32, torch.bool, torch.bfloat16):
        yield case("dense", str(dtype)[6:], dtype=dtype)
    for dtype in (torch.uint8, torch.float32):
        yield case("padded", str(dtype)[6:], dtype=dtype)
    for num_depths in range(1, MAX_DEPTH):
        yield case("padded", f"depth {num_depths}", num_depths=num_depths)
    yield case("dense", "depth 1", num_depths=1)
    yield case("dense", "[1, L]", rows=1)
    yield case("dense", "[L]", rows=None)
    yield case("padded", "[3, L]", rows=3)
    yield case("dense", "two in flight", order="in flight")
    yield case("padded", "into the same tensor", order="same input")
    yield case("dense", "not contiguous in memory", is_contiguous=False)
    # Two layouts of one length take turns.
    turns = ("packed, no padded bounds", "packed")  # after a first batch of "packed"
    yield case("packed", "layouts take turns", *turns)
    yield case("packed", "three in flight, layouts take turns", *turns, order="in flight")
