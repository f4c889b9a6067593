"""A mixture of experts in place of a feed-forward layer, and the loss that balances it.

The load-balancing loss (Switch Transformer, arXiv 2101.03961, equation 4, for top-k routing) of a sequence of T tokens
is E * sum_e (c_e / (k * T)) * (P_e / T): c_e tokens went to expert e, and P_e is the sum of its probabilities. It is
about the whole sequence, of which a rank sees a part: a layer gives its part of c and P, and `balance_loss` makes the
loss of them when the counts of all ranks have been added, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from overlap_mtp.model.config import ModelConfig


@dataclass(frozen=True)
class RouterStats:
    """What the experts of one layer were given of this rank's valid tokens."""

    counts: torch.Tensor  # [E], tokens by expert
    probabilities: torch.Tensor  # [E], their summed probabilities; has a gradient


class MoE(nn.Module):
    """Top-k routing over SwiGLU experts, a token's outputs weighed by its probabilities, which add up to 1.

    Under tensor parallelism (`mesh`, set by `parallel.parallelize`) a rank routes its part of the sequence and holds
    a part of every expert's inner width. No token is ever dropped.
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
        """x [B, L, hidden] -> the same, and the load; `valid` [L]: tokens that count in it.

        Under tensor parallelism L is this rank's part of the sequence, of x and of `valid` alike.
        """
        # Rounded to bfloat16, experts would often be equally good, and which of them is taken a matter of chance.
        precise = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(precise), self._local(self.router, Partial()).to(precise))
        probabilities = scores.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        load = self._load(probabilities, chosen, valid)
        x, weights, chosen = (self._gathered(tensor) for tensor in (x, weights, chosen))
        return self._summed(self._experts(x, weights, chosen)), load

    def _experts(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Expert by expert: the tokens that chose it, each scaled by its weight."""
        flat, out = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
        gates, ups, downs = (self._local(p) for p in (self.gate_proj, self.up_proj, self.down_proj))
        weights, chosen = weights.flatten(0, -2), chosen.flatten(0, -2)
        for expert in range(gates.shape[0]):
            token, place = torch.where(chosen == expert)
            mine = flat[token]
            inner = F.silu(mine @ gates[expert].T) * (mine @ ups[expert].T)
            out.index_add_(0, token, inner @ downs[expert].T * weights[token, place, None])
        return out.view_as(x)

    def _load(self, probabilities: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor) -> RouterStats:
        weight = valid.to(probabilities.dtype)[:, None]
        counts = F.one_hot(chosen, probabilities.shape[-1]).sum(-2) * weight
        total = (probabilities * weight).flatten(0, -2).sum(0)
        return RouterStats(counts.flatten(0, -2).sum(0).detach(), self._shared(total))

    def _local(self, parameter: torch.Tensor, gradient: Partial | None = None) -> torch.Tensor:
        """This rank's part of a parameter. `gradient`: how its gradients on the tp ranks relate, if not as it does."""
        if not isinstance(parameter, DTensor):
            return parameter
        local: torch.Tensor = parameter.to_local(grad_placements=[gradient] if gradient else None)
        return local

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L / tp, ...] -> [B, L, ...] on every tp rank; the gradients of all of them add up."""
        if self.mesh is None:
            return x
        whole = DTensor.from_local(x, self.mesh, [Shard(1)], run_check=False).redistribute(
            placements=[Replicate()]
        )
        local: torch.Tensor = whole.to_local(grad_placements=[Partial()])
        return local

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...], a term of a sum on every tp rank -> the sum's [B, L / tp, ...]."""
        if self.mesh is None:
            return x
        terms = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        local: torch.Tensor = terms.redistribute(placements=[Shard(1)]).to_local()
        return local

    def _shared(self, total: torch.Tensor) -> torch.Tensor:
        """Summed over the tp ranks, on each of them."""
        if self.mesh is None:
            return total
        terms = DTensor.from_local(total, self.mesh, [Partial()], run_check=False)
        local: torch.Tensor = terms.redistribute(placements=[Replicate()]).to_local()
        return local


def balance_loss(
    loads: list[RouterStats], num_tokens: int, config: ModelConfig, groups: list[dist.ProcessGroup]
) -> torch.Tensor:
    """This cp rank's term of T times the load-balancing loss, the mean over layers: to be divided by tokens.

    `num_tokens`: T, valid tokens of the whole microbatch. Adds the counts up over `groups` (tp and cp), once for all
    layers: recomputing a layer sends nothing.
    """
    counts = torch.stack([load.counts for load in loads])  # [layers, E]
    for group in groups:
        dist.all_reduce(counts, group=group)
    probabilities = torch.stack([load.probabilities for load in loads])
    scale = config.num_experts / (config.experts_per_token * max(num_tokens, 1) * len(loads))
    return (counts * probabilities).sum() * scale
