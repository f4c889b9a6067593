"""Small things about tensors that several parts need: uploads, integer views, and what tokens are counted in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IGNORE_INDEX = -100  # the label that does not count, as in torch.nn.functional.cross_entropy

# A roll only moves bits. The kernels see every dtype as integers of the same width.
INTEGER_VIEW = {
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.uint8: torch.uint8,
    torch.int8: torch.uint8,
    torch.bool: torch.uint8,
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tokens are summed in: int64 for integers and bool, float32 for half precision, else the same."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float32 if dtype.itemsize < 4 else dtype


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy a host array to `device` without waiting for it.

    Args:
        array: any shape and dtype.
        device: where to. A GPU copies from pinned memory, on its current stream.

    Returns:
        The tensor on `device`. On CPU it shares the array's memory.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
