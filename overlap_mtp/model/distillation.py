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
        p_logits, q_logits = _precise(student), _precise(teacher)
        highest = _reduced(torch.stack([p_logits.amax(-1), q_logits.amax(-1)]), dist.ReduceOp.MAX, group)
        sums = [
            (x - top[..., None]).exp_().sum(-1) for x, top in zip((p_logits, q_logits), highest, strict=True)
        ]
        normalizers = highest + _reduced(torch.stack(sums), dist.ReduceOp.SUM, group).log_()
        log_p, log_q = p_logits - normalizers[0][..., None], q_logits - normalizers[1][..., None]
        p, q = log_p.exp(), log_q.exp()
        if kind == "kl":
            parts = (q * (log_q - log_p)).sum(-1)[None]
        else:
            slope = 0.5 * (p - q).sign_()
            parts = torch.stack([(slope * p).sum(-1), (slope * q).sum(-1)])
        parts = _reduced(parts, dist.ReduceOp.SUM, group)
        ctx.kind = kind
        ctx.save_for_backward(student, teacher, counts, normalizers, parts)
        distances = parts[0] if kind == "kl" else parts[0] - parts[1]
        return torch.where(counts, distances, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, counts, normalizers, parts = ctx.saved_tensors
        wants_student, wants_teacher, *_ = ctx.needs_input_grad
        log_p, log_q = (
            _precise(x) - one[..., None] for x, one in zip((student, teacher), normalizers, strict=True)
        )
        p, q = log_p.exp(), log_q.exp()
        parts = parts[..., None]
        if ctx.kind == "kl":
            of_student = p - q
            of_teacher = q * (log_q - log_p - parts[0]) if wants_teacher else None
        else:
            slope = 0.5 * (p - q).sign_()
            of_student = p * (slope - parts[0])
            of_teacher = q * (parts[1] - slope) if wants_teacher else None

        def finished(one: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
            if one is None:
                return None
            return torch.where(counts[..., None], one * gradient[..., None], 0).to(like.dtype)

        return (
            finished(of_student if wants_student else None, student),
            finished(of_teacher, teacher),
            None,
            None,
            None,
        )


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduced(values: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Reduce over the ranks that share the vocabulary, in place."""
    if group is not None:
        dist.all_reduce(values, op, group=group)
    return values
