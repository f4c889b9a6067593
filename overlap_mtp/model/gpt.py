"""A decoder with multi-token prediction over a context-parallel group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.attention import Attention, AttentionPlan, Rope, attention_plan, rope
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.loss import DraftAcceptance, accepted_sum, count_tokens, masked_loss_sum, token_mask
from overlap_mtp.model.moe import MoE, RouterStats, balance_loss
from overlap_mtp.model.mtp import MTPDepth, MultiTokenPrediction
from overlap_mtp.model.recompute import recomputed
from overlap_mtp.recent import Recent
from overlap_mtp.schedules.roller import Rolls
from overlap_mtp.tensors import upload
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
    """Attention and a feed-forward layer or experts. With `recompute` backward computes it all again."""

    def __init__(self, config: ModelConfig, cp_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, cp_group)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = MoE(config) if config.num_experts else SwiGLU(config)
        self.recompute = False

    def forward(
        self, x: torch.Tensor, inputs: LayerInputs, before_ffn: torch.cuda.Event | None = None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """`before_ffn` is recorded right before the feed-forward layer, whose matrix products are long kernels."""
        return recomputed(self._forward, self.recompute)(x, inputs, before_ffn)

    def _forward(
        self, x: torch.Tensor, inputs: LayerInputs, before_ffn: torch.cuda.Event | None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        x = x + self.attention(self.attention_norm(x), inputs.rope, inputs.plan)
        normed, load = self.ffn_norm(x), None
        if before_ffn is not None:
            before_ffn.record()
        if isinstance(self.ffn, MoE):
            out, load = self.ffn(normed, inputs.valid)
        else:
            out = self.ffn(normed)
        return x + out, load


@dataclass(frozen=True)
class LayerInputs:
    """What every layer of a microbatch is given beside hidden states."""

    rope: Rope
    plan: AttentionPlan
    valid: torch.Tensor | None = None  # [L] bool, for experts: which of the tokens that they route count


class Starts(Protocol):
    """What starts an exchange: a roller, or something around one."""

    def start(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        ready: torch.cuda.Event | None = None,
    ) -> Rolls: ...


class GPT(nn.Module):
    """Trunk, MTP block and shared embedding and output head; `forward` gives the sums of its losses.

    `parallel.parallelize` spreads it over tensor-parallel ranks and shards its parameters; it alone sets `tp_group`.
    """

    def __init__(
        self,
        config: ModelConfig,
        cp_group: dist.ProcessGroup | None = None,
        schedule: str = "prefetch",
        max_documents: int = 128,
    ) -> None:
        super().__init__()
        self.config = config
        self.cp_group = cp_group
        self.cp_rank = 0 if cp_group is None else cp_group.rank()
        self.tp_group: dist.ProcessGroup | None = None
        self._is_compiled = False
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
            repeat_layer=config.repeat_mtp_layer,
            detach=config.detach_mtp,
            derive_labels=config.derive_labels,
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._ready: torch.cuda.Event | None = None
        self._dense_plans: Recent[AttentionPlan] = Recent()
        self.apply(_initialise)

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        roller: Starts | None = None,
        guesses: DraftAcceptance | None = None,
    ) -> torch.Tensor:
        """Loss sums [num_sums] over this rank's valid tokens: LM, MTP depth 1, 2, ..., load balancing of experts.

        `batch`: this rank's `input_ids`, `position_ids`, `labels` (unless the configuration derives them) and
        optionally `loss_mask`, [B, L] each. `roller`: by default the MTP block's own. `guesses` is given what was
        guessed right. The sums are fp32 or better; `model.loss.combine`
        turns them into the loss with `counts`.

        The exchange starts behind the first layer's launches: from then on the device is busy, so that the host
        time of starting (0.2 ms on cold caches, measured on H200) is hidden as well as the messages are. On the
        device it begins with that layer's feed-forward part, under kernels that are much longer than it is, and so
        does not fall into the pauses between short ones.
        """
        if missing := [name for name in ("input_ids", "position_ids") if name not in batch]:
            raise ValueError(f"the batch has no {' and no '.join(missing)}")
        if ("labels" in batch) is self.config.derive_labels:
            has = (
                "labels, and derive_labels"
                if self.config.derive_labels
                else "no labels, and no derive_labels"
            )
            raise ValueError(
                f"labels are either in the batch or derived from input_ids: this batch has {has}"
            )
        ids, position_ids = batch["input_ids"], batch["position_ids"]
        backward, ready = BackwardSpan(), None
        if ids.is_cuda:
            ready = self._ready = self._ready or torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        loads: list[RouterStats | None] = []
        with span("trunk"):
            hidden = backward.ends(self.embedding(ids))
            turns = rope(position_ids, self.config, hidden.dtype)
            inputs = LayerInputs(turns, self._plan(layout, ids.shape[0], hidden), self._routed(layout, ids))
            for number, layer in enumerate(self.layers):
                # A compiled layer is one piece, and nothing can be recorded in its midst.
                marks = (ready,) if number == 0 and ready and not self._is_compiled else ()
                hidden, load = layer(hidden, inputs, *marks)
                loads.append(load)
                if number == 0:
                    rolls = (roller or self.mtp).start(batch, layout, ready)
        tokens = dict(batch)
        if self.config.derive_labels:
            tokens["labels"] = rolls.at(1)["input_ids"]
        sums = [self._loss_sum(self.norm(hidden), tokens, layout, 0, guesses)]
        for prediction in self.mtp(hidden, rolls, self.embedding, inputs):
            sums.append(
                self._loss_sum(prediction.hidden, prediction.tokens, layout, prediction.depth, guesses)
            )
            loads.append(prediction.extra)
        if self.config.num_experts:
            groups = [group for group in (self.tp_group, self.cp_group) if group is not None]
            num_tokens = ids.shape[0] * int(layout.valid_lengths.sum())
            sums.append(balance_loss([load for load in loads if load], num_tokens, self.config, groups))
        return backward.begins(torch.stack(sums))

    def recompute_layers(self, wanted: bool = True) -> None:
        """Full recompute: backward computes every trunk layer and MTP depth again, each from its own inputs.

        The rolls are among these inputs, so that none of them is sent again. Keys and values are gathered again.
        """
        for block in (*self.layers, *self.mtp.depths):
            assert isinstance(block, DecoderLayer | MTPDepth)
            block.recompute = wanted

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles what trunk layers and MTP depths compute, by torch.compile, in place.

        Exchanges, FSDP's gathers and recomputation stay outside, so that they may be had or not. Raises ValueError
        for a model that is split over tp ranks: compiled, torch 2.13 refuses it or gives wrong gradients.
        """
        if self.tp_group is not None:
            raise ValueError("compiled layers and tp > 1 do not go together: leave one of them")
        for block in (*self.layers, *self.mtp.depths):
            block._forward = torch.compile(block._forward, backend=backend)
        self._is_compiled = True

    def counts(self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        """What `forward`'s sums are to be divided by, as far as this cp rank knows: [num_sums]. No communication."""
        config = self.config
        counts = count_tokens(batch, layout, self.cp_rank, config.num_depths, config.derive_labels)
        if config.num_experts:
            valid = batch["input_ids"].shape[0] * int(layout.valid(self.cp_rank).sum())
            counts = torch.cat([counts, counts.new_tensor([valid])])
        return counts

    def _loss_sum(
        self,
        hidden: torch.Tensor,
        tokens: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        depth: int,
        guesses: DraftAcceptance | None,
    ) -> torch.Tensor:
        labels, derived = tokens["labels"], self.config.derive_labels
        with span("loss", depth=depth):
            mask = token_mask(tokens.get("loss_mask"), layout, self.cp_rank, depth, labels, derived)
            weight: torch.Tensor = self.head.weight
            if depth and self.config.detach_mtp:
                weight = weight.detach()
            logits = functional_call(self.head, {"weight": weight}, (hidden,))
            if guesses is not None:
                guesses.right.append(accepted_sum(logits.detach(), labels, mask))
            return masked_loss_sum(logits, labels, mask)

    def _routed(self, layout: SequenceLayout, ids: torch.Tensor) -> torch.Tensor | None:
        """Which of the tokens that this rank's experts route are tokens of a document, [L] or a tp rank's part."""
        if not self.config.num_experts:
            return None
        valid = upload(layout.valid(self.cp_rank), ids.device)
        return valid if self.tp_group is None else valid.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _plan(self, layout: SequenceLayout, rows: int, hidden: torch.Tensor) -> AttentionPlan:
        if layout.is_packed:
            return attention_plan(layout, self.cp_rank, rows, hidden)
        key = (layout.key, rows, hidden.device, hidden.dtype)
        return self._dense_plans.get(key, lambda: attention_plan(layout, self.cp_rank, rows, hidden))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, MoE):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
