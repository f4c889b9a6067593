"""A GPTModel of Megatron-LM with MTP layers, whose core attention is ours.

Megatron-LM's own attention needs Transformer Engine as soon as ranks share a sequence. Ours gathers keys and values
over the cp group and attends within documents. It also rotates queries and keys, because Megatron-LM's unfused rotary
embedding of packed sequences waits for the device. All other code of the model is Megatron-LM's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from dropin.batches import Batch
from dropin.sizes import Problem
from overlap_mtp.model.attention import AttentionPlan, Rope, gather_sequence, rotate

SEED = 1234


class GatheredAttention(nn.Module):
    """What Megatron-LM calls core attention: from queries, keys and values of this rank's tokens to its outputs."""

    plan: AttentionPlan  # of the current batch, as `rope`
    rope: Rope

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Attend within documents, to all ranks' keys.

        Args:
            query: [tokens, batch, heads, head_dim], or without `batch` if documents are packed.
            key, value: the same with key heads.

        Returns:
            [tokens, batch, heads * head_dim], or without `batch`.
        """
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (one.unsqueeze(1) for one in (query, key, value))
        q, k, v = (one.transpose(0, 1) for one in (query, key, value))
        kv = torch.stack([rotate(k, self.rope), v], dim=-2)
        out = self.plan.attend(rotate(q, self.rope).contiguous(), gather_sequence(kv, self.cp_group))
        out = out.transpose(0, 1).flatten(2)
        return out[:, 0] if is_packed else out.contiguous()


def _config(problem: Problem, on_cpu: bool) -> TransformerConfig:
    model = problem.model
    recompute = {"granularity": "full", "method": "uniform", "num_layers": 1} if problem.recompute else {}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=problem.dtype is torch.bfloat16,
        params_dtype=problem.dtype,
        pipeline_dtype=problem.dtype,
        context_parallel_size=problem.cp,
        tensor_model_parallel_size=problem.tp,
        sequence_parallel=problem.sequence_parallel,
        mtp_num_layers=model.num_depths,
        mtp_loss_scaling_factor=model.mtp_loss_factor,
        use_cpu_initialization=on_cpu,
        # All of these need Apex or Transformer Engine.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        **{f"recompute_{name}": value for name, value in recompute.items()},
    )


def initialize(problem: Problem) -> None:
    """Make Megatron-LM's process groups and random generators. Collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=problem.tp, context_parallel_size=problem.cp
    )
    seed = tensor_parallel.model_parallel_cuda_manual_seed
    seed(
        SEED, **({"force_reset_rng": True} if "force_reset_rng" in inspect.signature(seed).parameters else {})
    )
    torch.manual_seed(SEED)


class MegatronModel:
    """The model on this rank. All ranks of a cp group begin with the same weights.

    Args:
        problem: the sizes.
        device: of the weights.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.cp_group = parallel_state.get_context_parallel_group()
        config = _config(problem, device.type == "cpu")
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = GatheredAttention
        self.gpt = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=problem.model.vocab_size,
            max_sequence_length=problem.seq_len,
            position_embedding_type="none",
            mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
        )
        self.gpt.to(device)
        if problem.dtype is not torch.float32:
            self.gpt.to(problem.dtype)  # as Megatron-LM's Float16Module does
        self.gpt.train()
        self._attentions = [one for one in self.gpt.modules() if isinstance(one, GatheredAttention)]
        with torch.no_grad():
            for parameter in self.gpt.parameters():
                dist.broadcast(
                    parameter.data, min(dist.get_process_group_ranks(self.cp_group)), self.cp_group
                )

    @property
    def num_parameters(self) -> int:
        """The number of parameters on this rank."""
        return sum(parameter.numel() for parameter in self.gpt.parameters())

    def load(self, batch: Batch) -> None:
        """Tell all layers' attention of the next batch, and forget gradients and MTP losses. Not a step's time."""
        for attention in self._attentions:
            attention.plan, attention.rope = batch.plan, batch.rope
        self.gpt.zero_grad(set_to_none=True)
        MTPLossLoggingHelper.tracker.clear()

    def loss(self, batch: Batch, packed_seq_params: PackedSeqParams | None) -> torch.Tensor:
        """Return the mean loss over this rank's tokens. Its gradient includes that of the MTP losses.

        Args:
            batch: the one that `load` was told of.
            packed_seq_params: what `batch.packed_seq_params` returned.
        """
        losses = self.gpt(
            batch.input_ids,
            batch.position_ids,
            None,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=packed_seq_params,
        )
        mean: torch.Tensor = (losses.float() * batch.loss_mask).sum() / batch.num_tokens
        return mean

    @staticmethod
    def mtp_losses() -> torch.Tensor:
        """Return this rank's MTP losses since `load`, by depth; float32 [depths]."""
        tracker = MTPLossLoggingHelper.tracker
        by_depth: torch.Tensor = tracker["loss_values" if "loss_values" in tracker else "values"]
        return by_depth.clone()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return copies of all gradients by the name of their parameter."""
        named = self.gpt.named_parameters()
        return {name: one.grad.clone() for name, one in named if one.grad is not None}
