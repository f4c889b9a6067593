"""Causal attention over a sequence that context-parallel ranks share.

Each rank keeps its own queries and gathers all keys and values. A query sees the keys of its document up to its own
position. An `AttentionPlan` says which keys these are; the rest of the code is the same for every layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.tensors import upload

# torch 2.13 renamed these collectives.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@cache
def flash_attention() -> Callable[..., Any]:
    """Return torch's attention over segments. Only plans that need it import it: that takes two seconds."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 does not have this option. It accepts fewer key heads than query heads without it.
    has_option = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if has_option else varlen_attn


@dataclass(frozen=True)
class MaskPlan:
    """A mask of the gathered keys that each local query sees. Works for any device and dtype."""

    mask: torch.Tensor  # bool [L, cp_size * L], keys in the order of the gathered shards

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, device: torch.device) -> MaskPlan:
        document = np.repeat(np.arange(layout.num_documents), np.diff(layout.cu_seqlens))
        query = layout.positions(cp_rank)
        key = np.concatenate([layout.positions(rank) for rank in range(layout.cp_size)])
        sees = (document[query][:, None] == document[key]) & (key <= query[:, None])
        return cls(upload(sees, device))

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Attend with q [B, L, heads, head_dim] to kv [B, cp_size * L, kv_heads, 2, head_dim]; shaped as q."""
        k, v = kv.unbind(-2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True)
class VarlenPlan:
    """Segments for flash attention (CUDA, half precision): one for each run of queries and batch row."""

    cu_seqlens_q: torch.Tensor  # int32 [segments + 1]
    cu_seqlens_k: torch.Tensor
    longest_q: int
    longest_k: int
    key_index: torch.Tensor  # int32 [keys of all segments], indices into the gathered shards of all rows
    attention: Callable[..., Any]  # flash_attention(), called outside of compiled layers

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, batch_size: int, device: torch.device) -> VarlenPlan:
        runs = layout.runs(cp_rank)
        begin, end, start = runs.begin, runs.end, layout.cu_seqlens[runs.document]
        used = begin < end
        lengths_q, lengths_k = (end - begin)[used], (end - start)[used]
        bounds_k = np.concatenate([[0], np.cumsum(lengths_k)])
        position = np.arange(bounds_k[-1]) + np.repeat(start[used] - bounds_k[:-1], lengths_k)
        index = layout.gather_index[position] + np.arange(batch_size)[:, None] * layout.seq_len
        cu = [
            np.concatenate([[0], np.cumsum(np.tile(lengths, batch_size))]).astype(np.int32)
            for lengths in (lengths_q, lengths_k)
        ]
        table = upload(np.concatenate([*cu, index.astype(np.int32).ravel()]), device)
        cu_seqlens_q, cu_seqlens_k, keys = table.tensor_split([cu[0].size, 2 * cu[0].size])
        longest = int(lengths_q.max()), int(lengths_k.max())
        return cls(cu_seqlens_q, cu_seqlens_k, *longest, keys, flash_attention())

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Do what MaskPlan.attend does."""
        k, v = kv.flatten(0, 1).index_select(0, self.key_index).unbind(-2)
        out = self.attention(
            q.flatten(0, 1),
            k,
            v,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.longest_q,
            self.longest_k,
            window_size=(-1, 0),  # causal; queries are the last positions of their segment's keys
        )
        assert isinstance(out, torch.Tensor)
        return out.view_as(q)


AttentionPlan = MaskPlan | VarlenPlan
Rope = tuple[torch.Tensor, torch.Tensor]


def attention_plan(
    layout: SequenceLayout, cp_rank: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """Return the plan for a batch.

    Args:
        layout: the layout of the batch.
        cp_rank: this rank in the cp group.
        batch_size: rows of the batch.
        device, dtype: those of the hidden states. They choose between flash attention and a mask.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return VarlenPlan.of(layout, cp_rank, batch_size, device)
    return MaskPlan.of(layout, cp_rank, device)


class GatherSequence(torch.autograd.Function):
    """Gather [B, L, ...] into [cp_size, B, L, ...], shards in rank order. Gradients are summed over ranks.

    torch's functional collectives do the same but take 0.2 ms more host time a layer (measured on H200, torch 2.11),
    which small steps cannot hide.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cp_group: dist.ProcessGroup) -> torch.Tensor:
        ctx.cp_group = cp_group
        gathered = x.new_empty((cp_group.size(), *x.shape))
        all_gather(gathered.flatten(0, 1), x.contiguous(), group=cp_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.new_empty(gradient.shape[1:])
        reduce_scatter(own, gradient.contiguous().flatten(0, 1), group=ctx.cp_group)
        return own, None


def gather_sequence(x: torch.Tensor, cp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather [B, L, ...] into [B, cp_size * L, ...], shards in rank order. Gradients are summed over ranks."""
    if cp_group is None or cp_group.size() == 1:
        return x
    gathered: torch.Tensor = GatherSequence.apply(x, cp_group)  # type: ignore[no-untyped-call]
    return gathered.transpose(0, 1).flatten(1, 2)


def rope(position_ids: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Return cos and signed sin of the rotary embedding's angles (RoFormer, arXiv 2104.09864).

    Args:
        position_ids: each token's position in its document, [B, L].
        config: gives `head_dim` and `rope_theta`.
        dtype: the dtype of the result. The angles are computed in fp32 or better.

    Returns:
        Two tensors [B, L, 1, 1, head_dim].
    """
    precise = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=precise)
    angles = position_ids.to(precise)[..., None] * config.rope_theta ** -(pairs / config.head_dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1)[:, :, None, None], torch.cat([-sin, sin], -1)[:, :, None, None]


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of the last dimension by their angles."""
    cos, signed_sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over a context-parallel group."""

    def __init__(self, config: ModelConfig, cp_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.cp_group = cp_group
        self.queries_per_key = config.num_heads // config.num_kv_heads
        # For each key head: its query heads, the key, the value.
        width = config.num_kv_heads * (self.queries_per_key + 2) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, rope: Rope, plan: AttentionPlan) -> torch.Tensor:
        """Attend to all tokens of the sequence. Gathers keys and values once.

        Args:
            x: this rank's tokens, [B, L, hidden]. Under tensor parallelism, this tp rank's part of the L tokens.
            rope: what `rope` returns for their positions.
            plan: what `attention_plan` returns for the batch.

        Returns:
            A tensor shaped as `x`.
        """
        qkv = self.qkv_proj(x)
        qkv = qkv.view(*qkv.shape[:2], -1, self.queries_per_key + 2, self.config.head_dim)
        rotated = rotate(qkv[..., :-1, :], rope)
        q = rotated[..., :-1, :].flatten(2, 3)
        kv = torch.stack([rotated[..., -1, :], qkv[..., -1, :]], dim=-2)
        attended = plan.attend(q, gather_sequence(kv, self.cp_group))
        out: torch.Tensor = self.out_proj(attended.flatten(-2))
        return out
