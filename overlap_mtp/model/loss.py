"""Losses as sums over valid tokens, and the counts that they are divided by.

A rank's sum over its own tokens is divided by the count over all ranks, so that ranks with unequal numbers of
valid tokens weigh every token alike, and a rank without any adds 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tensors import sum_dtype, upload


def token_mask(
    mask: torch.Tensor | None,
    layout: SequenceLayout,
    cp_rank: int,
    depth: int,
    like: torch.Tensor,
    derive_labels: bool = False,
) -> torch.Tensor:
    """What each token's loss weighs at a depth: `mask` (already rolled by it), 0 outside documents.

    Without a mask, 1 for every token whose label at that depth is inside its document. With `derive_labels` a label is
    the id after the last one seen: a document's last token has none. Broadcasts to [B, L].
    """
    padded = bool((layout.valid_ends < layout.cu_seqlens[1:]).any())
    if mask is not None and not derive_labels and (depth > 0 or not padded):
        return mask
    valid = upload(layout.valid(cp_rank, depth + derive_labels), like.device)
    return valid if mask is None else mask * valid


def masked_loss_sum(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of cross entropies: logits [B, L, vocab], labels [B, L], mask broadcast to [B, L]; fp32 or better.

    The mask alone decides what counts: a label of -100 adds nothing, but is counted unless its mask is 0. Logits whose
    vocabulary is split over ranks are a DTensor; forward and backward then run under `loss_parallel()`, and each rank
    gets the whole sum.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(precise.flatten(0, 1), labels.flatten().long(), reduction="none")
    if isinstance(losses, DTensor):
        losses = losses.to_local()
    return torch.where(mask != 0, losses.view_as(labels) * mask, 0).sum()


class DraftAcceptance:
    """Where a forward pass leaves what it guessed right. No list: FSDP2 hands copies of containers on."""

    def __init__(self) -> None:
        self.right: list[torch.Tensor] = []  # accepted_sum of LM and of each depth


@torch.no_grad()
def accepted_sum(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How much of the mask lies on tokens whose likeliest next one is the label. Arguments as in masked_loss_sum.

    Where the vocabulary is split over ranks, each sends its best logit of every token and no more.
    """
    if isinstance(logits, DTensor):
        mesh = logits.device_mesh
        best, place = logits.to_local().max(-1)
        place = place + mesh.get_local_rank() * (logits.shape[-1] // mesh.size())
        both = torch.stack([best.double(), place.double()])
        gathered = DTensor.from_local(
            both[None], mesh, [Shard(0)], run_check=False
        ).full_tensor()  # [tp, 2, B, L]
        winner = gathered[:, 0].argmax(0, keepdim=True)
        guess = gathered[:, 1].gather(0, winner)[0].long()
    else:
        guess = logits.argmax(-1)
    return torch.where(guess == labels, mask, 0).to(sum_dtype(mask.dtype)).expand_as(labels).sum()


def count_tokens(
    batch: Mapping[str, torch.Tensor],
    layout: SequenceLayout,
    cp_rank: int,
    num_depths: int,
    derive_labels: bool = False,
) -> torch.Tensor:
    """What the loss sums of `GPT.forward` are to be divided by, as far as this rank knows: [1 + num_depths].

    Entry k is the sum of the mask over this rank's valid tokens that are at least k into their document: what
    the mask rolled by k sums to over all ranks, without a roll. int64, or fp32 or better for a float mask. Sum it
    over the cp and dp ranks and over the microbatches of a step. With `derive_labels` a document's last token does not
    count, whose label is not there.
    """
    mask = batch.get("loss_mask")
    ids = batch["input_ids"]
    if mask is None:
        mask = torch.ones_like(ids)
    valid = upload(layout.valid(cp_rank, int(derive_labels)), ids.device)
    offsets = upload(layout.offsets(cp_rank), ids.device)
    kept = torch.where(valid, mask.to(sum_dtype(mask.dtype)), 0)
    return torch.stack([torch.where(offsets >= k, kept, 0).sum() for k in range(num_depths + 1)])


def combine(
    sums: torch.Tensor, counts: torch.Tensor, mtp_loss_factor: float, aux_loss_factor: float | None = None
) -> torch.Tensor:
    """LM loss + factor / D * sum of the depths' losses, each its sum over its count; 0 where nothing counts.

    With `aux_loss_factor` the last entry is the load-balancing loss of experts, added with that factor.
    """
    means = sums / torch.where(counts > 0, counts, 1).to(sums.dtype)
    if aux_loss_factor is None:
        return means[0] + mtp_loss_factor * means[1:].mean()
    return means[0] + mtp_loss_factor * means[1:-1].mean() + aux_loss_factor * means[-1]
