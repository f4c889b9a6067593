"""A decoder with multi-token prediction over a context-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.activations import RolledRows
from overlap_mtp.model.attention import AttentionPlan, attention_plan, rope
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.decoder import DecoderLayer, LayerInputs
from overlap_mtp.model.distillation import distillation_sum
from overlap_mtp.model.loss import (
    DraftAcceptance,
    accepted_sum,
    count_tokens,
    counted_tokens,
    masked_loss_sum,
    token_mask,
)
from overlap_mtp.model.moe import MoE, RouterStats, balance_loss
from overlap_mtp.model.mtp import MultiTokenPrediction, Recomputed
from overlap_mtp.schedules.roller import Roller
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.tensors import upload
from overlap_mtp.tracing import BackwardSpan, span


class GPT(nn.Module):
    """A decoder trunk and an MTP block that share the embedding and the output head.

    `overlap_mtp.training.parallel.parallelize` splits it over tensor-parallel ranks, shards its parameters and sets
    `tp_group`.

    Args:
        config: the model's sizes.
        cp_group: the ranks that share the sequence; None if this rank holds all of it.
        schedule, max_documents: as in `make_roller`.
        activation_schedule: as `schedule` in `make_activation_roller`.
    """

    def __init__(
        self,
        config: ModelConfig,
        cp_group: dist.ProcessGroup | None = None,
        schedule: str = "prefetch",
        max_documents: int = 128,
        activation_schedule: str = "overlap",
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
            ignore_index=config.ignore_index,
            mix_hidden_states=config.hidden_state_mixing,
            activation_schedule=activation_schedule,
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._ready: torch.cuda.Event | None = None
        self._dense_plan: Callable[..., AttentionPlan] = lru_cache(4)(attention_plan)
        self.apply(_initialise)

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        layout: SequenceLayout,
        roller: Roller | TimedRoller | None = None,
        acceptance: DraftAcceptance | None = None,
        mixing_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sums of the losses over this rank's valid tokens.

        The exchanges of tokens and of embeddings start after the kernels of half of the layers are launched. The host
        is then usually ahead of the GPU, so the host time of starting (0.2 ms for tokens on cold caches, measured on
        H200, and more for embeddings) is hidden too. The exchange of tokens may begin together with the feed-forward
        part of the last of these layers, whose kernels are much longer than the exchange. Other activations leave where
        they are born (`overlap_mtp.model.activations`).

        Args:
            batch: this rank's `input_ids`, `position_ids`, `labels` (unless the configuration derives them) and
                optionally `loss_mask`, [B, L] each.
            layout: the layout of the batch.
            roller: starts the exchange; by default the MTP block's own roller.
            acceptance: receives how many drafted tokens were right.
            mixing_keys: if hidden states are mixed, a key for each row of the batch, int64 [B]: the same on all ranks
                that share the row. Default: zeros.

        Returns:
            [num_sums]: LM, MTP depth 1, 2, ..., and load balancing if there are experts; fp32 or better. The sum of a
            depth holds its distillation, too: both are means over the same tokens.
            `overlap_mtp.model.loss.combine` turns them and the counts of `counts` into the loss.

        Raises:
            ValueError: if the batch lacks a tensor, or has labels although the configuration derives them.
        """
        if missing := [name for name in ("input_ids", "position_ids") if name not in batch]:
            raise ValueError(f"the batch has no {' and no '.join(missing)}")
        if ("labels" in batch) is self.config.derive_labels:
            raise ValueError(
                "the batch has labels although derive_labels is set: remove the labels"
                if self.config.derive_labels
                else "the batch has no labels and derive_labels is not set: add labels or set derive_labels"
            )
        ids, position_ids = batch["input_ids"], batch["position_ids"]
        backward, ready = BackwardSpan(), None
        if ids.is_cuda:
            ready = self._ready = self._ready or torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        stats: list[RouterStats | None] = []
        with span("trunk"):
            hidden = embeddings = backward.ends(self.embedding(ids))
            embed: nn.Module | RolledRows = self.embedding
            angles = rope(position_ids, self.config, hidden.dtype)
            make_plan = attention_plan if layout.is_packed else self._dense_plan
            plan = make_plan(layout, self.cp_rank, ids.shape[0], hidden.device, hidden.dtype)
            inputs = [LayerInputs(angles, plan, valid) for valid in self._routed(layout, ids)]
            middle = (len(self.layers) - 1) // 2
            for number, layer in enumerate(self.layers):
                # A compiled layer is one graph: no event can be recorded inside it.
                events = (ready,) if number == middle and ready and not self._is_compiled else ()
                hidden, layer_stats = layer(hidden, inputs[0], *events)
                stats.append(layer_stats)
                if number == middle:
                    rolls = self.mtp.start(batch, layout, ready, roller)
                    if self.config.mtp_inputs == "embeddings":
                        embed = self.mtp.start_embeddings(embeddings, layout)
        tokens = dict(batch)
        if self.config.derive_labels:
            tokens |= rolls.at(0)
        normed = self.norm(hidden)
        teacher = self._start_teacher(normed, layout)
        sums = [self._loss_sum(normed, tokens, layout, 0, acceptance)]
        if self.config.hidden_state_mixing and mixing_keys is None:
            mixing_keys = ids.new_zeros(ids.shape[0], dtype=torch.int64)
        for p in self.mtp(hidden, rolls, embed, by_depth=inputs[1:], layout=layout, mixing_keys=mixing_keys):
            sums.append(self._loss_sum(p.hidden, p.tokens, layout, p.depth, acceptance, teacher))
            stats.append(p.extra)
        if self.config.num_experts:
            groups = [group for group in (self.tp_group, self.cp_group) if group is not None]
            lengths = layout.valid_lengths
            depths = [0] * len(self.layers) + list(range(1, self.config.num_depths + 1))
            routed = [ids.shape[0] * int((lengths - depth).clip(0).sum()) for depth in depths]
            sums.append(balance_loss([one for one in stats if one], routed, self.config, groups))
        return backward.begins(torch.stack(sums))

    def recompute_layers(self, wanted: bool = True) -> None:
        """Let backward compute every trunk layer and MTP depth again instead of keeping their activations.

        Each layer is computed from its own inputs. The rolls are among these inputs, so no roll is sent again. Keys
        and values are gathered again.
        """
        for block in (*self.layers, *self.mtp.depths):
            assert isinstance(block, Recomputed)
            block.recompute = wanted

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile every trunk layer and MTP depth with torch.compile, in place.

        The exchange, FSDP's gathers and recomputation stay outside of the compiled graphs.

        Raises:
            ValueError: if the model is split over tp ranks. torch 2.13 then refuses it or computes wrong gradients.
        """
        if self.tp_group is not None:
            raise ValueError("compiled layers and tp > 1 do not go together: set tp to 1 or do not compile")
        for block in (*self.layers, *self.mtp.depths):
            block._forward = torch.compile(block._forward, backend=backend)
        self._is_compiled = True

    def counts(self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        """Return this cp rank's part of the counts that divide `forward`'s sums: [num_sums]. No communication.

        `batch` and `layout` are those of `forward`. See `overlap_mtp.model.loss.count_tokens`.
        """
        config = self.config
        counts = count_tokens(
            batch, layout, self.cp_rank, config.num_depths, config.derive_labels, config.ignore_index
        )
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
        acceptance: DraftAcceptance | None,
        teacher: RolledRows | None = None,
    ) -> torch.Tensor:
        config, labels = self.config, tokens["labels"]
        with span("loss", depth=depth):
            mask = token_mask(
                tokens.get("loss_mask"), layout, self.cp_rank, depth, labels, config.derive_labels
            )
            logits = self._logits(hidden, is_weight_detached=depth > 0 and config.detach_mtp)
            if acceptance is not None:
                right = accepted_sum(logits.detach(), labels, mask, config.ignore_index)
                acceptance.right.append(right)
            loss = masked_loss_sum(logits, labels, mask, config.ignore_index)
            if teacher is None:
                return loss
            ahead = self._logits(teacher.at(depth), is_weight_detached=config.distillation_detach)
            counts = counted_tokens(labels, mask, config.ignore_index)
            distances = distillation_sum(config.distillation, logits, ahead, counts, mask)
            return loss + config.distillation_weight * distances

    def _start_teacher(self, normed: torch.Tensor, layout: SequenceLayout) -> RolledRows | None:
        """Start the exchange of the trunk's normalised hidden states, which the loss of depth 1 joins."""
        if self.config.distillation == "none":
            return None
        rows = normed.detach() if self.config.distillation_detach else normed
        return self.mtp.activations.start("teacher", rows, self.config.num_depths, layout)

    def _logits(self, hidden: torch.Tensor, is_weight_detached: bool) -> torch.Tensor:
        weight: torch.Tensor = self.head.weight
        return functional_call(  # type: ignore[no-any-return]
            self.head, {"weight": weight.detach() if is_weight_detached else weight}, (hidden,)
        )

    def _routed(self, layout: SequenceLayout, ids: torch.Tensor) -> list[torch.Tensor | None]:
        """Return for the trunk and for each depth which tokens enter the experts' statistics.

        At depth k these are the tokens whose document holds a token k further on. Bool [L] each, or a tp rank's part.
        """
        depths = range(1 + self.config.num_depths)
        if not self.config.num_experts:
            return [None for _ in depths]
        valid = upload(np.stack([layout.valid(self.cp_rank, depth) for depth in depths]), ids.device)
        if self.tp_group is not None:
            valid = valid.chunk(self.tp_group.size(), -1)[self.tp_group.rank()]
        return list(valid)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, MoE):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
