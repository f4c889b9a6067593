"""A mixture of experts that replaces the feed-forward layer, and its load-balancing loss.

The loss is that of Switch Transformer (arXiv 2101.03961, equation 4) for top-k routing. For a sequence of T tokens it
is E * sum_e (c_e / (k * T)) * (P_e / T): c_e is the number of tokens that chose expert e, and P_e is the sum of their
router's probabilities for e. A rank sees only a part of the sequence, so each layer returns its part of c and P.
`balance_loss` adds the counts of all ranks, once for all layers, and computes the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from overlap_mtp.model.config import ModelConfig


@dataclass(frozen=True)
class RouterStats:
    """What one layer's router did with this rank's valid tokens."""

    counts: torch.Tensor  # [E], tokens that chose each expert
    probabilities: torch.Tensor  # [E], sum of each expert's probabilities; has a gradient


class MoE(nn.Module):
    """Route each token to its k best SwiGLU experts and add their outputs, weighted by the router's probabilities.

    The k weights of a token are scaled to add up to 1, and no token is dropped. Under tensor parallelism (`mesh`, set
    by `overlap_mtp.training.parallel.parallelize`) a rank routes its part of the sequence and holds a part of every
    expert's inner width.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        experts, hidden, ffn = config.num_experts, config.hidden_size, config.ffn_size
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.gate_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.mesh: DeviceMesh | None = None

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, RouterStats]:
        """Run the experts. Under tensor parallelism L is this rank's part of the sequence.

        Args:
            x: [B, L, hidden].
            valid: bool [L]; only these tokens enter the statistics.

        Returns:
            The output, shaped as `x`, and the router's statistics.
        """
        # In bfloat16 experts would often get the same score, and chance would choose between them.
        precise = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(precise), _local(self.router, Partial()).to(precise))
        probabilities = scores.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        weight = valid.to(probabilities.dtype)[:, None]
        counts = (F.one_hot(chosen, probabilities.shape[-1]).sum(-2) * weight).flatten(0, -2).sum(0)
        total = self._redistributed((probabilities * weight).flatten(0, -2).sum(0), Partial(), Replicate())
        # Each tp rank computes a term of every token's output: the gradients of what it is given add up.
        x, weights, chosen = (
            self._redistributed(tensor, Shard(1), Replicate(), Partial()) for tensor in (x, weights, chosen)
        )
        out = self._redistributed(self._experts(x, weights, chosen), Partial(), Shard(1))
        return out, RouterStats(counts.detach(), total)

    def _experts(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Run each expert on the tokens that chose it, and add its output times their weights."""
        flat, out = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
        gates, ups, downs = (_local(p) for p in (self.gate_proj, self.up_proj, self.down_proj))
        weights, chosen = weights.flatten(0, -2), chosen.flatten(0, -2)
        for expert in range(gates.shape[0]):
            token, choice = torch.where(chosen == expert)
            mine = flat[token]
            inner = F.silu(mine @ gates[expert].T) * (mine @ ups[expert].T)
            out.index_add_(0, token, inner @ downs[expert].T * weights[token, choice, None])
        return out.view_as(x)

    def _redistributed(
        self, x: torch.Tensor, source: Placement, target: Placement, gradient: Placement | None = None
    ) -> torch.Tensor:
        """Move a tensor between placements over the tp ranks; without tensor parallelism, return it as it is.

        `gradient` is the placement of the result's gradient if it is not `target`.
        """
        if self.mesh is None:
            return x
        moved = DTensor.from_local(x, self.mesh, [source], run_check=False).redistribute(placements=[target])
        return _local(moved, gradient)


def _local(tensor: torch.Tensor, gradient: Placement | None = None) -> torch.Tensor:
    """Return this rank's part of a tensor. `gradient` is the placement of its gradient if it differs."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: torch.Tensor = tensor.to_local(grad_placements=[gradient] if gradient else None)
    return local


def balance_loss(
    stats: list[RouterStats], num_tokens: list[int], config: ModelConfig, groups: list[dist.ProcessGroup]
) -> torch.Tensor:
    """Return this cp rank's term of T times the load-balancing loss (mean over layers). Divide it by token counts.

    T is the number of tokens that the first layer routed. The layer of an MTP depth routes fewer, and its own loss is
    a mean over these.

    Adds the counts up over `groups` with one all-reduce each for all layers together. Recomputed layers therefore
    send nothing again.

    Args:
        stats: the statistics of each layer.
        num_tokens: for each layer, the tokens of the whole microbatch that enter its statistics.
        config: the model's sizes.
        groups: the tp and cp groups.

    Returns:
        A scalar.
    """
    counts = torch.stack([one.counts for one in stats])  # [layers, E]
    for group in groups:
        dist.all_reduce(counts, group=group)
    probabilities = torch.stack([one.probabilities for one in stats])
    scale = num_tokens[0] * config.num_experts / (config.experts_per_token * len(stats))
    losses = [
        (count * probability).sum() * (scale / max(tokens, 1) ** 2)
        for count, probability, tokens in zip(counts, probabilities, num_tokens, strict=True)
    ]
    return torch.stack(losses).sum()
