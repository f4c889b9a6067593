"""Losses as sums over valid tokens, and the counts that they are divided by.

A rank's sum over its own tokens is divided by the count over all ranks, so that ranks with unequal numbers of
valid tokens weigh every token alike, and a rank without any adds 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from overlap_mtp.dtypes import sum_dtype
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.upload import upload


def token_mask(
    mask: torch.Tensor | None, layout: SequenceLayout, cp_rank: int, depth: int, like: torch.Tensor
) -> torch.Tensor:
    """What each token's loss weighs at a depth: `mask` (already rolled by it), 0 outside documents.

    Without a mask, 1 for every token whose label at that depth is inside its document. Broadcasts to [B, L].
    """
    padded = bool((layout.valid_ends < layout.cu_seqlens[1:]).any())
    if mask is not None and (depth > 0 or not padded):
        return mask
    valid = upload(layout.valid(cp_rank, depth), like.device)
    return valid if mask is None else mask * valid


def masked_loss_sum(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of cross entropies: logits [B, L, vocab], labels [B, L], mask broadcast to [B, L]; fp32 or better.

    The mask alone decides what counts: a label of -100 adds nothing, but is counted unless its mask is 0.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(precise.flatten(0, 1), labels.flatten().long(), reduction="none").view_as(labels)
    return torch.where(mask != 0, losses * mask, 0).sum()


def count_tokens(
    batch: Mapping[str, torch.Tensor], layout: SequenceLayout, cp_rank: int, num_depths: int
) -> torch.Tensor:
    """What the loss sums of `GPT.forward` are to be divided by, as far as this rank knows: [1 + num_depths].

    Entry k is the sum of the mask over this rank's valid tokens that are at least k into their document: what
    the mask rolled by k sums to over all ranks, without a roll. int64, or fp32 or better for a float mask. Sum it
    over the cp and dp ranks and over the microbatches of a step.
    """
    mask = batch.get("loss_mask")
    ids = batch["input_ids"]
    if mask is None:
        mask = torch.ones_like(ids)
    valid = upload(layout.valid(cp_rank), ids.device)
    offsets = upload(layout.offsets(cp_rank), ids.device)
    kept = torch.where(valid, mask.to(sum_dtype(mask.dtype)), 0)
    return torch.stack([torch.where(offsets >= k, kept, 0).sum() for k in range(num_depths + 1)])


def combine(sums: torch.Tensor, counts: torch.Tensor, mtp_loss_factor: float) -> torch.Tensor:
    """LM loss + factor / D * sum of the depths' losses, each its sum over its count; 0 where nothing counts."""
    means = sums / torch.where(counts > 0, counts, 1).to(sums.dtype)
    return means[0] + mtp_loss_factor * means[1:].mean()
