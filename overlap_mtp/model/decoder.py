"""A layer of the decoder: attention, then a feed-forward layer or experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from overlap_mtp.model.attention import Attention, AttentionPlan, Rope
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.moe import MoE, RouterStats
from overlap_mtp.model.mtp import Recomputed


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(Recomputed):
    """Attention, then a feed-forward layer or experts. Return hidden states, and the router's statistics if any.

    The event `before_ffn` is recorded just before the feed-forward layer, whose kernels are long.
    """

    def __init__(self, config: ModelConfig, cp_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, cp_group)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = MoE(config) if config.num_experts else SwiGLU(config)

    def _forward(
        self, x: torch.Tensor, inputs: LayerInputs, before_ffn: torch.cuda.Event | None = None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        x = x + self.attention(self.attention_norm(x), inputs.rope, inputs.plan)
        normed, stats = self.ffn_norm(x), None
        if before_ffn is not None:
            before_ffn.record()
        if isinstance(self.ffn, MoE):
            out, stats = self.ffn(normed, inputs.valid)
        else:
            out = self.ffn(normed)
        return x + out, stats


@dataclass(frozen=True)
class LayerInputs:
    """The inputs, besides hidden states, that all layers of a microbatch share."""

    rope: Rope
    plan: AttentionPlan
    valid: torch.Tensor | None = None  # bool [L], for experts: the tokens that enter the layer's statistics
