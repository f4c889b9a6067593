"""Random layouts and tensors for property-based tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from overlap_mtp.layout import SequenceLayout, length_unit, pad_documents

DTYPES = (torch.int32, torch.int64, torch.bool, torch.float32, torch.bfloat16)
CP_SIZES = (1, 2, 3, 4, 8)


@st.composite
def layouts(draw: st.DrawFn, cp_sizes: tuple[int, ...] = CP_SIZES, max_documents: int = 5) -> SequenceLayout:
    """Zigzag and contiguous; dense and packed; padded or not; chunks down to one token, empty documents."""
    cp_size = draw(st.sampled_from(cp_sizes))
    kind = draw(st.sampled_from(["zigzag", "contiguous"]))
    unit = length_unit(cp_size, kind)
    if draw(st.booleans()):
        return SequenceLayout.dense(unit * draw(st.integers(1, 6)), cp_size, kind)
    lengths = draw(st.lists(st.integers(0, 3 * unit + 5), min_size=1, max_size=max_documents))
    if draw(st.booleans()):
        return pad_documents([torch.zeros(n) for n in lengths], cp_size, kind)[1]
    padded = [n // unit * unit for n in lengths]
    padded[-1] += unit  # the stream is not empty
    bounds = [sum(padded[:i]) for i in range(len(padded) + 1)]
    valid = [draw(st.integers(0, n)) for n in padded] if draw(st.booleans()) else None
    return SequenceLayout.packed(bounds, cp_size, kind, valid)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every bit pattern of `dtype`, so that a copy that is not exact shows."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(dtype, dtype)
    low, high = -(2 ** (8 * bits.itemsize - 1)), 2 ** (8 * bits.itemsize - 1) - 1
    return torch.randint(low, high, shape, dtype=bits, generator=generator).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of dtype, shape and every bit (NaNs included)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bits(a), as_bits(b))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
