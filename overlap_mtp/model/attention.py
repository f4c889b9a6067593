"""Causal attention over a sequence that context-parallel ranks share: gather keys and values, attend locally.

Each rank keeps its queries, gathers all keys and values, and lets each run of queries see its document from the
start to the run's end. Which positions those are is data of `AttentionPlan`, for every layout alike.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.nn.attention.varlen import varlen_attn

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.upload import upload

# torch 2.13 renames it.
all_gather_autograd = getattr(functional, "all_gather_single_autograd", functional.all_gather_tensor_autograd)
# torch 2.11 has no such option and takes fewer key than query heads as they come.
GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class MaskPlan:
    """Which gathered key each local query sees, as a mask: any device and dtype."""

    mask: torch.Tensor  # bool [L, cp_size * L], keys in the order of the gathered shards

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, device: torch.device) -> MaskPlan:
        document = np.repeat(np.arange(layout.num_documents), np.diff(layout.cu_seqlens))
        query = layout.positions(cp_rank)
        key = np.concatenate([layout.positions(rank) for rank in range(layout.cp_size)])
        sees = (document[query][:, None] == document[key]) & (key <= query[:, None])
        return cls(upload(sees, device))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, L, heads, head_dim], k and v [B, cp_size * L, kv_heads, head_dim] -> like q."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True)
class VarlenPlan:
    """One segment per run of queries and batch row, for flash attention (CUDA, half precision)."""

    cu_seqlens_q: torch.Tensor  # int32 [segments + 1]
    cu_seqlens_k: torch.Tensor
    longest_q: int
    longest_k: int
    key_index: torch.Tensor  # int32 [keys of all segments], into the gathered shards of all rows

    @classmethod
    def of(cls, layout: SequenceLayout, cp_rank: int, batch_size: int, device: torch.device) -> VarlenPlan:
        runs = layout.runs(cp_rank)
        begin, end, start = runs.begin, runs.end, layout.cu_seqlens[runs.document]
        used = begin < end
        lengths_q, lengths_k = (end - begin)[used], (end - start)[used]
        bounds_k = np.concatenate([[0], np.cumsum(lengths_k)])
        position = np.arange(bounds_k[-1]) + np.repeat(start[used] - bounds_k[:-1], lengths_k)
        index = layout.gather_index[position]
        rows = np.arange(batch_size)[:, None]
        cu = [
            np.concatenate([[0], np.cumsum(np.tile(lengths, batch_size))]).astype(np.int32)
            for lengths in (lengths_q, lengths_k)
        ]
        key_index = (index + rows * layout.seq_len).astype(np.int32).ravel()
        table = upload(np.concatenate([*cu, key_index]), device)
        size = cu[0].size
        return cls(
            table[:size],
            table[size : 2 * size],
            int(lengths_q.max()),
            int(lengths_k.max()),
            table[2 * size :],
        )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Shapes as in MaskPlan.attend."""
        keys, values = (side.flatten(0, 1).index_select(0, self.key_index) for side in (k, v))
        out = varlen_attn(
            q.flatten(0, 1),
            keys,
            values,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.longest_q,
            self.longest_k,
            window_size=(-1, 0),  # causal, aligned at the end of each segment
            **GQA,
        )
        assert isinstance(out, torch.Tensor)
        return out.view_as(q)


AttentionPlan = MaskPlan | VarlenPlan


def attention_plan(
    layout: SequenceLayout, cp_rank: int, batch_size: int, like: torch.Tensor
) -> AttentionPlan:
    """The plan for tensors of the device and dtype of `like`."""
    if like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16):
        return VarlenPlan.of(layout, cp_rank, batch_size, like.device)
    return MaskPlan.of(layout, cp_rank, like.device)


def gather_sequence(x: torch.Tensor, cp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """[B, L, ...] -> [B, cp_size * L, ...], shards in rank order; gradients are summed over ranks."""
    if cp_group is None or cp_group.size() == 1:
        return x
    gathered: torch.Tensor = all_gather_autograd(x.contiguous(), gather_dim=0, group=cp_group)
    return gathered.view(cp_group.size(), *x.shape).transpose(0, 1).flatten(1, 2)


def rope_angles(position_ids: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    """Angles [B, L, 1, head_dim / 2] of the rotary embedding (RoFormer, arXiv 2104.09864), fp32 or better."""
    precise = torch.promote_types(dtype, torch.float32)
    exponent = (
        torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=precise) / config.head_dim
    )
    return (position_ids.to(precise)[..., None] * config.rope_theta**-exponent).unsqueeze(2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (i, i + head_dim / 2) of x [B, L, heads, head_dim] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over a context-parallel group."""

    def __init__(self, config: ModelConfig, cp_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.cp_group = cp_group
        width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)  # per head: key, then value
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> torch.Tensor:
        """x [B, L, hidden] of this rank's tokens; `rope` their (cos, sin). Gathers keys and values once."""
        q = self.q_proj(x).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        k, v = self.kv_proj(x).unflatten(-1, (self.config.num_kv_heads, 2, self.config.head_dim)).unbind(-2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = gather_sequence(torch.stack([k, v], dim=2), self.cp_group).unbind(2)
        out: torch.Tensor = self.out_proj(plan.attend(q, k, v).flatten(-2))
        return out
