"""What a roll is, in the plainest torch: what every schedule must equal."""

from __future__ import annotations

import torch

from overlap_mtp.layout import TAIL, SequenceLayout


def roll_reference(
    tensor: torch.Tensor, layout: SequenceLayout, depth: int, fill: float | bool = 0
) -> torch.Tensor:
    """Shift the full sequence left by `depth`, inside each document.

    It defines what every schedule computes: Megatron-LM's `roll_tensor`, extended to padded documents.

    Args:
        tensor: [..., S].
        layout: of the sequence.
        depth: at least 1.
        fill: what stands in for a token that is not there.

    Returns:
        [..., S] of the same dtype. Entry i is entry i + depth if that is a valid token of the same document, otherwise
        `fill`. A tail, which belongs to no document, is left as it is.

    Raises:
        ValueError: if the depth is below 1 or the length is not the layout's.
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    if tensor.shape[-1] != layout.seq_len:
        raise ValueError(
            f"the last dimension must have the layout's length {layout.seq_len}, got {tensor.shape[-1]}"
        )
    rolled = torch.full_like(tensor, fill)
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        if length == TAIL:
            rolled[..., start:] = tensor[..., start:]
        elif length > depth:
            rolled[..., start : start + length - depth] = tensor[..., start + depth : start + length]
    return rolled
