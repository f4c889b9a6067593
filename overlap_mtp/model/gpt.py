"""A decoder with multi-token prediction over a context-parallel group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.attention import Attention, AttentionPlan, Rope, attention_plan, rope
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.loss import masked_loss_sum, token_mask
from overlap_mtp.model.mtp import MultiTokenPrediction
from overlap_mtp.recent import Recent
from overlap_mtp.schedules.base import Rolls
from overlap_mtp.tracing import BackwardSpan, span


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


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, cp_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, cp_group)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(
        self, x: torch.Tensor, rope: Rope, plan: AttentionPlan, before_ffn: torch.cuda.Event | None = None
    ) -> torch.Tensor:
        """`before_ffn` is recorded right before the feed-forward layer, whose matrix products are long kernels."""
        x = x + self.attention(self.attention_norm(x), rope, plan)
        normed = self.ffn_norm(x)
        if before_ffn is not None:
            before_ffn.record()
        out: torch.Tensor = x + self.ffn(normed)
        return out


class Starts(Protocol):
    """What starts an exchange: a roller, or something around one."""

    def start(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        ready: torch.cuda.Event | None = None,
    ) -> Rolls: ...


class GPT(nn.Module):
    """Trunk, MTP block and shared embedding and output head; `forward` gives the sums of its losses."""

    def __init__(
        self,
        config: ModelConfig,
        cp_group: dist.ProcessGroup | None = None,
        schedule: str = "prefetch",
        max_documents: int = 128,
    ) -> None:
        super().__init__()
        self.config = config
        self.cp_rank = 0 if cp_group is None else cp_group.rank()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, cp_group) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mtp = MultiTokenPrediction(
            config.hidden_size,
            config.num_depths,
            lambda depth: DecoderLayer(config, cp_group),
            cp_group=cp_group,
            schedule=schedule,
            max_documents=max_documents,
            norm_eps=config.norm_eps,
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._ready: torch.cuda.Event | None = None
        self._dense_plans: Recent[AttentionPlan] = Recent()
        self.apply(_initialise)

    def forward(
        self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout, roller: Starts | None = None
    ) -> torch.Tensor:
        """Loss sums [1 + num_depths] over this rank's valid tokens: LM, then MTP depth 1, 2, ...

        `batch`: this rank's `input_ids`, `position_ids`, `labels` and optionally `loss_mask`, [B, L] each.
        `roller`: by default the MTP block's own. The sums are fp32 or better; `model.loss.combine` turns them into
        the loss.

        The exchange starts behind the first layer's launches: from then on the device is busy, so that the host
        time of starting (0.2 ms on cold caches, measured on H200) is hidden as well as the messages are. On the
        device it begins with that layer's feed-forward part, under kernels that are much longer than it is, and so
        does not fall into the pauses between short ones.
        """
        ids, position_ids = batch["input_ids"], batch["position_ids"]
        backward, ready = BackwardSpan(), None
        if ids.is_cuda:
            ready = self._ready = self._ready or torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        with span("trunk"):
            hidden = backward.ends(self.embedding(ids))
            turns = rope(position_ids, self.config, hidden.dtype)
            plan = self._plan(layout, hidden)
            first = self.layers[0]
            # A compiled layer is one piece, and nothing can be recorded in its midst.
            marks = () if ready is None or first._compiled_call_impl else (ready,)
            hidden = first(hidden, turns, plan, *marks)
            rolls = (roller or self.mtp).start(batch, layout, ready)
            for layer in self.layers[1:]:
                hidden = layer(hidden, turns, plan)
        sums = [self._loss_sum(self.norm(hidden), batch, layout, depth=0)]
        for prediction in self.mtp(hidden, rolls, self.embedding, turns, plan):
            sums.append(self._loss_sum(prediction.hidden, prediction.tokens, layout, prediction.depth))
        return backward.begins(torch.stack(sums))

    def _loss_sum(
        self, hidden: torch.Tensor, tokens: Mapping[str, torch.Tensor], layout: SequenceLayout, depth: int
    ) -> torch.Tensor:
        with span("loss", depth=depth):
            mask = token_mask(tokens.get("loss_mask"), layout, self.cp_rank, depth, like=tokens["labels"])
            return masked_loss_sum(self.head(hidden), tokens["labels"], mask)

    def _plan(self, layout: SequenceLayout, hidden: torch.Tensor) -> AttentionPlan:
        rows = hidden.shape[0]
        if layout.is_packed:
            return attention_plan(layout, self.cp_rank, rows, hidden)
        key = (layout.key, rows, hidden.device, hidden.dtype)
        return self._dense_plans.get(key, lambda: attention_plan(layout, self.cp_rank, rows, hidden))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
