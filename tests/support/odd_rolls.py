"""Rolls that hang, crash, raise or leave messages behind, each for one dtype. Otherwise they are right."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout

from mutants import plain_roll

correct = plain_roll()


def odd_roll(
    tensor: torch.Tensor,
    shifts: int = -1,
    dims: int = -1,
    cp_group: dist.ProcessGroup | None = None,
    packed_seq_params: Any = None,
    layout: SequenceLayout | None = None,
) -> torch.Tensor:
    """It returns no sum."""
    assert cp_group is not None
    is_first = cp_group.rank() == 0
    if tensor.dtype == torch.int32 and not is_first:
        time.sleep(1000)
    if tensor.dtype == torch.uint8 and is_first:
        os._exit(7)
    if tensor.dtype == torch.float32 and is_first:
        raise NotImplementedError("no float32 on this rank\nand more lines")
    if tensor.dtype == torch.bfloat16 and is_first:
        dist.isend(tensor[..., 0].contiguous(), 1, group=cp_group)
    if tensor.dtype == torch.float64:
        raise NotImplementedError("no float64")
    return correct(tensor, shifts, dims, cp_group, packed_seq_params, layout)[0]
