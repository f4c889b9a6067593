"""Copy words from pinned memory to the device, where many programs read them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from overlap_mtp.kernels.common import copy_words
from overlap_mtp.kernels.launch import Launch


@triton.jit
def upload_kernel(host_words, words, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    copy_words(host_words, words, FIRST, END, BLOCK)


def upload(host_words: torch.Tensor, words: torch.Tensor, first: int = 0, end: int | None = None) -> Launch:
    """Bind the kernel that copies words [first, end).

    Args:
        host_words: int64, pinned.
        words: as many, on the device.
        first, end: which of them. Default: all.

    Returns:
        The launch.
    """
    end = len(host_words) if end is None else end
    constants = {"FIRST": first, "END": end, "BLOCK": triton.next_power_of_2(end - first)}
    return Launch(upload_kernel, (host_words, words), (1, 1, 1), **constants)
