"""Which dtypes are rolled, as which integers they travel, and in what they are counted."""

from __future__ import annotations

import torch

# Rolls only move bits: the kernels see integers of each dtype's own width.
INTEGER_VIEW = {
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.bool: torch.uint8,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tokens are counted in: int64 for integers and bool, float32 for half precision, else their own."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float32 if dtype.itemsize < 4 else dtype
