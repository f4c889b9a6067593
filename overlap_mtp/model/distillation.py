"""Distillation of the trunk into the depths: how far a depth's prediction is from the trunk's for the same token.

At position i, depth k and the trunk at position i + k predict the same token. The trunk's normalised hidden states are
rolled by k, which are fewer bytes than logits, and the head turns them into the teacher's logits on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from overlap_mtp.model.config import Distillation


def distillation_sum(
    kind: Distillation,
    student: torch.Tensor,
    teacher: torch.Tensor,
    counts: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the sum of the tokens' distances between two predictions, each times its mask.

    Tokens that do not count have no influence, whatever their logits are, and get no gradient.

    Args:
        kind: "tv", the total variation 0.5 * sum |q - p|, or "kl", KL(q || p) = sum q * (log q - log p). p is the
            student's softmax, q is the teacher's.
        student, teacher: logits [B, L, vocab]. If tensor-parallel ranks share the vocabulary, DTensors. The tp ranks
            then add up the softmax's statistics in three small messages, and send nothing in backward.
        counts: bool [B, L], the tokens that count (`overlap_mtp.model.loss.counted_tokens`).
        mask: weights that broadcast to [B, L].

    Returns:
        A scalar in fp32 or better; for DTensors, the whole sum on each rank.
    """
    group = None
    if isinstance(student, DTensor):
        assert isinstance(teacher, DTensor)
        group = student.device_mesh.get_group()
        student, teacher = student.to_local(), teacher.to_local()
    distances: torch.Tensor = _Distance.apply(student, teacher, counts, kind, group)  # type: ignore[no-untyped-call]
    return (distances * torch.where(counts, mask, 0)).sum()


class _Distance(torch.autograd.Function):
    """The distance of each token, [B, L]. Its gradients are written out: only logits and [B, L] values are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        counts: torch.Tensor,
        kind: Distillation,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        highest = torch.stack([student.amax(-1), teacher.amax(-1)]).to(precise)
        highest = _reduced(highest, dist.ReduceOp.MAX, group)
        sums = torch.stack(
            [_minus(x, top).exp_().sum(-1) for x, top in zip((student, teacher), highest, strict=True)]
        )
        normalizers = highest + _reduced(sums, dist.ReduceOp.SUM, group).log_()
        log_p, log_q = _minus(student, normalizers[0]), _minus(teacher, normalizers[1])
        if kind == "kl":
            q = log_q.exp()
            parts = q.mul_(log_q.sub_(log_p)).sum(-1)[None]
        else:
            p, q = log_p.exp_(), log_q.exp_()
            slope = (p - q).sign_().mul_(0.5)
            parts = torch.stack([p.mul_(slope).sum(-1), q.mul_(slope).sum(-1)])
        parts = _reduced(parts, dist.ReduceOp.SUM, group)
        ctx.kind = kind
        ctx.save_for_backward(student, teacher, counts, normalizers, parts)
        distances = parts[0] if kind == "kl" else parts[0] - parts[1]
        return torch.where(counts, distances, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, counts, normalizers, parts = ctx.saved_tensors
        log_p, log_q = _minus(student, normalizers[0]), _minus(teacher, normalizers[1])
        if ctx.kind == "kl":
            q = log_q.exp()
            of_teacher = _minus(log_q.sub_(log_p), parts[0]).mul_(q)
            of_student = log_p.exp_().sub_(q)
        else:
            p, q = log_p.exp_(), log_q.exp_()
            slope = (p - q).sign_().mul_(0.5)
            of_teacher = q.mul_(_minus(slope, parts[1]).neg_())
            of_student = p.mul_(_minus(slope, parts[0]))
        gradients = [
            torch.where(counts[..., None], one.mul_(gradient[..., None]), 0).to(like.dtype)
            if is_wanted
            else None
            for one, like, is_wanted in zip(
                (of_student, of_teacher), (student, teacher), ctx.needs_input_grad[:2], strict=True
            )
        ]
        return *gradients, None, None, None


def _minus(rows: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
    """Subtract a value from each row: a new tensor, in the wider dtype of both."""
    return rows - of_row[..., None]


def _reduced(values: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Reduce over the ranks that share the vocabulary, in place."""
    if group is not None:
        dist.all_reduce(values, op, group=group)
    return values
