"""Losses as sums over this rank's valid tokens, and the token counts that divide them.

Each rank divides the sum over its own tokens by the count over all ranks. All tokens then have the same weight even
if ranks hold different numbers of valid tokens, and a rank without valid tokens adds 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.tensors import IGNORE_INDEX, sum_dtype, upload


def token_mask(
    mask: torch.Tensor | None,
    layout: SequenceLayout,
    cp_rank: int,
    depth: int,
    like: torch.Tensor,
    derive_labels: bool = False,
) -> torch.Tensor:
    """Return the weight of each token's loss at one depth. Labels that are ignored have none, too (`masked_loss_sum`).

    Args:
        mask: the batch's loss mask, already rolled by `depth`, [B, L]; None gives every valid token weight 1.
        layout: the layout of the batch.
        cp_rank: this rank in the cp group.
        depth: 0 for the LM loss, k for MTP depth k.
        like: any tensor on the device of the result.
        derive_labels: a token's label is the id after it. The last token of a document then has no label.

    Returns:
        A tensor that broadcasts to [B, L]. It is 0 for tokens whose label lies outside of their document.
    """
    padded = bool((layout.valid_ends < layout.cu_seqlens[1:]).any())
    is_rolled = depth > 0 and not layout.tail_len  # then it is 0 past the end of a document
    if mask is not None and not derive_labels and (is_rolled or not padded):
        return mask
    valid = upload(layout.valid(cp_rank, depth + derive_labels), like.device)
    return valid if mask is None else mask.masked_fill(~valid, 0)


def counted_tokens(
    labels: torch.Tensor, mask: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Return which tokens count: bool [B, L], true unless the mask is 0 or the label is `ignore_index`."""
    return (mask != 0) & (labels != ignore_index)


def masked_loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Return the sum of the tokens' cross entropies, each times its mask.

    A token counts unless its mask is 0 or its label is `ignore_index`. Logits and labels of tokens that do not count
    have no influence, whatever they are, and get no gradient. (A gradient of 0 times hidden states that are not finite
    is NaN in the gradient of the head's weight: if hidden states may be so, zero them before the head.)

    Args:
        logits: [B, L, vocab]. If tensor-parallel ranks share the vocabulary, a DTensor; run forward and backward
            inside `loss_parallel()` then.
        labels: integers [B, L].
        mask: weights that broadcast to [B, L].
        ignore_index: the label that does not count.

    Returns:
        A scalar in fp32 or better; for a DTensor, the whole sum on each rank.

    Raises:
        ValueError: if a label that counts is outside of the vocabulary. On CUDA the host does not wait for the labels:
            an assertion on the device fails, and the next call that waits for the device raises RuntimeError.
    """
    counts = counted_tokens(labels, mask, ignore_index)
    target = torch.where(counts, labels.long(), ignore_index)
    _check_labels(target, counts, logits)
    if isinstance(logits, DTensor):
        precise: torch.Tensor = DTensor.from_local(
            _precise(logits.to_local(), counts),
            logits.device_mesh,
            logits.placements,
            run_check=False,
            shape=logits.shape,
            stride=logits.stride(),
        )
    else:
        precise = _precise(logits, counts)
    losses = F.cross_entropy(
        precise.flatten(0, 1), target.flatten(), reduction="none", ignore_index=ignore_index
    )
    if isinstance(losses, DTensor):
        losses = losses.to_local()
    return (losses.view_as(labels) * torch.where(counts, mask, 0)).sum()


def _precise(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Convert logits to fp32 or better. Rows that do not count get a gradient of 0."""
    precise: torch.Tensor = _Precise.apply(logits, counts)  # type: ignore[no-untyped-call]
    return precise


class _Precise(torch.autograd.Function):
    """Cross entropy never reads a row that it ignores, but its gradient there is NaN if the logits are not finite.

    The pass that converts the gradient sets these to 0.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(counts)
        ctx.dtype = logits.dtype
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (counts,) = ctx.saved_tensors
        # fmin(x, nan) is x, so that rows that count keep their bits. fmin(nan, 0) is 0.
        limit = torch.where(counts, torch.nan, 0.0)[..., None]
        converted = torch.empty_like(gradient, dtype=ctx.dtype)
        return torch.fmin(gradient, limit, out=converted), None


def _check_labels(target: torch.Tensor, counts: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise ValueError if a label that counts is outside of the vocabulary. On CUDA, assert it on the device."""
    vocab_size = logits.shape[-1]
    if target.is_cuda and not isinstance(logits, DTensor):
        return  # cross_entropy asserts it
    wrong = counts & ((target < 0) | (target >= vocab_size))
    if target.is_cuda:
        # There is no public assertion that does not wait for the device.
        torch._assert_async(~wrong.any(), f"a label is outside of the vocabulary [0, {vocab_size})")
    elif wrong.any():
        raise ValueError(
            f"label {int(target[wrong][0])} counts and is outside of the vocabulary [0, {vocab_size}): correct it, "
            "set its mask to 0, or set it to the ignore_index"
        )


class DraftAcceptance:
    """Collects how many drafted tokens were right in one forward pass.

    It is not a plain list because FSDP2 passes copies of containers to a module's forward.
    """

    def __init__(self) -> None:
        self.right: list[torch.Tensor] = []  # accepted_sum of the LM head, then of each depth


@torch.no_grad()
def accepted_sum(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Return the sum of the mask over tokens whose most likely next token is the label.

    Labels that are `ignore_index` do not count.

    If tensor-parallel ranks share the vocabulary, each rank sends only its best logit of every token and that
    logit's index.

    Args:
        logits: [B, L, vocab], a DTensor if the vocabulary is shared.
        labels: integers [B, L].
        mask: weights that broadcast to [B, L].
        ignore_index: the label that does not count.

    Returns:
        A scalar of dtype `sum_dtype(mask.dtype)`.
    """
    if isinstance(logits, DTensor):
        mesh = logits.device_mesh
        best, index = logits.to_local().max(-1)
        index = index + mesh.get_local_rank() * -(-logits.shape[-1] // mesh.size())  # as DTensor cuts it
        both = torch.stack([best.double(), index.double()])
        shards = DTensor.from_local(both[None], mesh, [Shard(0)], run_check=False)
        gathered = shards.full_tensor()  # [tp, 2, B, L]
        winner = gathered[:, 0].argmax(0, keepdim=True)
        drafted = gathered[:, 1].gather(0, winner)[0].long()
    else:
        drafted = logits.argmax(-1)
    right = (drafted == labels) & (labels != ignore_index)
    return torch.where(right, mask, 0).to(sum_dtype(mask.dtype)).expand_as(labels).sum()


def count_tokens(
    batch: Mapping[str, torch.Tensor],
    layout: SequenceLayout,
    cp_rank: int,
    num_depths: int,
    derive_labels: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Return this rank's part of the counts that divide the loss sums. Needs no roll and no communication.

    Entry k is the sum of the mask over this rank's valid tokens that have at least k tokens before them in their
    document and a label that is not `ignore_index`: such a label is the label of the token k before it at depth k.
    Added up over all ranks, entry k equals the sum of `token_mask` at depth k over the labels that are not ignored.
    Before `combine`, add it up over the cp and dp ranks and over the microbatches of a step.

    Args:
        batch: `input_ids` and optionally `labels` and `loss_mask`, [B, L] each.
        layout: the layout of the batch.
        cp_rank: this rank in the cp group.
        num_depths: the number of MTP depths.
        derive_labels: labels are the next ids. The last token of a document then does not count.
        ignore_index: the label that does not count.

    Returns:
        [1 + num_depths]; int64, or fp32 or better if the mask is a float tensor.
    """
    mask = batch.get("loss_mask")
    ids = batch["input_ids"]
    if mask is None:
        mask = torch.ones_like(ids)
    valid = upload(layout.valid(cp_rank, int(derive_labels)), ids.device)
    offsets = upload(layout.offsets(cp_rank), ids.device)
    if "labels" in batch and not derive_labels:
        valid = valid & (batch["labels"] != ignore_index)
    kept = torch.where(valid, mask.to(sum_dtype(mask.dtype)), 0)
    return torch.stack([torch.where(offsets >= k, kept, 0).sum() for k in range(num_depths + 1)])


def combine(
    sums: torch.Tensor, counts: torch.Tensor, mtp_loss_factor: float, aux_loss_factor: float | None = None
) -> torch.Tensor:
    """Return this rank's term of the loss: LM loss + mtp_loss_factor * mean over depths of the MTP losses.

    Args:
        sums: this rank's loss sums [1 + num_depths]; with `aux_loss_factor`, one entry more for load balancing.
        counts: what divides them, of the same shape, added up over all ranks. If a count is 0, that loss is 0.
        mtp_loss_factor: the weight of the MTP losses.
        aux_loss_factor: the weight of the load-balancing loss; None if there are no experts.

    Returns:
        A scalar. Its sum over the ranks is the loss of the batch.
    """
    means = sums / torch.where(counts > 0, counts, 1).to(sums.dtype)
    if aux_loss_factor is None:
        return means[0] + mtp_loss_factor * means[1:].mean()
    return means[0] + mtp_loss_factor * means[1:-1].mean() + aux_loss_factor * means[-1]
