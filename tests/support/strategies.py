"""Random layouts and tensors for property-based tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from overlap_mtp.documents import pad_documents
from overlap_mtp.layout import SequenceLayout, length_unit

DTYPES = (
    *(torch.int32, torch.int64, torch.bool, torch.float32, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.float16, torch.float64),
)
NAMES = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")
# Each width with a fill that is not 0.
ALL_DTYPES = dict(
    zip(NAMES, (torch.int32, torch.uint8, torch.int64, torch.float64, torch.bfloat16), strict=True)
)
NO_LABELS = (torch.bool, torch.uint8)  # they cannot hold -100
FILLS = {"labels": -100, "padding_mask": 1}
CP_SIZES = (1, 2, 3, 4, 8)
KINDS = ("zigzag", "contiguous", "zigzag_stream")

dtype_choices = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(DTYPES), min_size=1).filter(
    lambda dtypes: dtypes.get("labels") not in NO_LABELS
)


@st.composite
def layouts(
    draw: st.DrawFn,
    cp_sizes: tuple[int, ...] = CP_SIZES,
    max_documents: int = 5,
    kinds: tuple[str, ...] = KINDS,
    has_dense: bool = True,
) -> SequenceLayout:
    """All kinds; dense and packed; padded or not; with and without a tail; short chunks, empty documents."""
    cp_size, kind = draw(st.sampled_from(cp_sizes)), draw(st.sampled_from(kinds))
    multiple = length_unit(cp_size, kind)
    if has_dense and draw(st.booleans()):
        return SequenceLayout.dense(multiple * draw(st.integers(1, 6)), cp_size, kind)
    # A tail counts as a document.
    lengths = draw(st.lists(st.integers(0, 3 * multiple + 5), min_size=1, max_size=max_documents - 1))
    if draw(st.booleans()):
        return pad_documents([torch.zeros(n) for n in lengths], cp_size, kind)[1]
    own = multiple if kind == "zigzag" else 1
    padded = [n // own * own for n in lengths]
    bounds = [sum(padded[:i]) for i in range(len(padded) + 1)]
    valid = [draw(st.integers(0, n)) for n in padded] if draw(st.booleans()) else None
    if draw(st.booleans()) and bounds[-1] % multiple == 0 < bounds[-1]:
        return SequenceLayout.packed(bounds, cp_size, kind, valid)
    cut = cp_size if kind == "zigzag" else multiple  # what the tail leads up to
    seq_len = (bounds[-1] // cut + draw(st.integers(1, 5))) * cut
    return SequenceLayout.packed(bounds, cp_size, kind, valid, seq_len)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every bit pattern of `dtype`, so that a copy that is not exact shows."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(signed)
    return torch.randint(info.min, info.max, shape, dtype=signed, generator=generator).view(dtype)


def random_batch(
    layout: SequenceLayout, rows: int = 2, seed: int = 0, dtypes: dict[str, torch.dtype] = ALL_DTYPES
) -> dict[str, torch.Tensor]:
    """Full tensors [rows, S] of the given names and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor((rows, layout.seq_len), dtype, generator) for name, dtype in dtypes.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are equal (NaNs included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
