"""The oracle: what the rest must equal, on one process, in the plainest torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from overlap_mtp.layout import SequenceLayout

if TYPE_CHECKING:
    from overlap_mtp.model.gpt import GPT


def roll_reference(
    tensor: torch.Tensor, layout: SequenceLayout, depth: int, fill: float | bool = 0
) -> torch.Tensor:
    """The full sequence shifted left by `depth` inside each document.

    `tensor` [..., S] -> [..., S] of the same dtype: entry i becomes entry i + depth where that is a valid
    token of i's document, else `fill`. Defines what every schedule computes (Megatron-LM `roll_tensor`,
    extended to padded documents).
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    if tensor.shape[-1] != layout.seq_len:
        raise ValueError(
            f"the last dimension must have the layout's length {layout.seq_len}, got {tensor.shape[-1]}"
        )
    rolled = torch.full_like(tensor, fill)
    for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
        if length > depth:
            rolled[..., start : start + length - depth] = tensor[..., start + depth : start + length]
    return rolled


def loss_reference(model: GPT, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
    """The loss of the full batch ([B, S] each) with the model's parameters, one document at a time.

    Shares no code with the model: formulas on its parameters, explicit softmax, and Python slices for the rolls.
    Its gradients are what context-parallel gradients must sum to.
    """
    weights = dict(model.named_parameters())
    config = model.config
    sums = [torch.zeros((), dtype=model.embedding.weight.dtype) for _ in range(1 + config.num_depths)]
    counts = [0.0] * (1 + config.num_depths)
    for row in range(batch["input_ids"].shape[0]):
        for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
            document = {name: tensor[row, start : start + length] for name, tensor in batch.items()}
            if length == 0:
                continue
            mask = document.get("loss_mask", torch.ones(length))
            for k, hidden in enumerate(_hidden_by_depth(model, weights, document)):
                if length <= k:
                    continue
                logits = hidden[: length - k] @ weights["head.weight"].T
                log_p = logits.log_softmax(-1).gather(-1, document["labels"][k:, None].long())[:, 0]
                weight = mask[k:].to(log_p.dtype)
                sums[k] = sums[k] - (log_p * weight).sum()
                counts[k] += float(weight.sum())
    means = [total / (count or 1.0) for total, count in zip(sums, counts, strict=True)]
    return means[0] + config.mtp_loss_factor / config.num_depths * torch.stack(means[1:]).sum()


def _hidden_by_depth(
    model: GPT, weights: Mapping[str, torch.Tensor], document: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Normalised hidden states [length, hidden] of the trunk and of each depth, for one document."""
    config, ids = model.config, document["input_ids"].long()
    embedding = weights["embedding.weight"]
    hidden = embedding[ids]
    for layer in range(config.num_layers):
        hidden = _decoder_layer(model, weights, f"layers.{layer}.", hidden, document["position_ids"])
    states = [_rms_norm(hidden, weights["norm.weight"], config.norm_eps)]
    for depth in range(config.num_depths):
        name = f"mtp.depths.{depth}."
        ids = torch.cat([ids[1:], ids.new_zeros(1)])
        both = [
            _rms_norm(embedding[ids], weights[name + "enorm.weight"], config.norm_eps),
            _rms_norm(hidden, weights[name + "hnorm.weight"], config.norm_eps),
        ]
        hidden = torch.cat(both, -1) @ weights[name + "eh_proj.weight"].T
        hidden = _decoder_layer(model, weights, name + "layer.", hidden, document["position_ids"])
        states.append(_rms_norm(hidden, weights[name + "norm.weight"], config.norm_eps))
    return states


def _decoder_layer(
    model: GPT, weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    config = model.config
    length, head_dim = x.shape[0], config.head_dim
    normed = _rms_norm(x, weights[name + "attention_norm.weight"], config.norm_eps)
    per_key = config.num_heads // config.num_kv_heads
    qkv = normed @ weights[name + "attention.qkv_proj.weight"].T
    qkv = qkv.view(length, config.num_kv_heads, per_key + 2, head_dim)
    future = torch.ones(length, length).triu(1).bool()
    heads = []
    for head in range(config.num_heads):
        group = qkv[:, head // per_key]
        query = _rope(group[:, head % per_key], position_ids, config.rope_theta)
        key, value = _rope(group[:, -2], position_ids, config.rope_theta), group[:, -1]
        scores = (query @ key.T / head_dim**0.5).masked_fill(future, float("-inf"))
        heads.append(scores.softmax(-1) @ value)
    x = x + torch.cat(heads, -1) @ weights[name + "attention.out_proj.weight"].T
    normed = _rms_norm(x, weights[name + "ffn_norm.weight"], config.norm_eps)
    gate = normed @ weights[name + "ffn.gate_proj.weight"].T
    inner = gate * gate.sigmoid() * (normed @ weights[name + "ffn.up_proj.weight"].T)
    return x + inner @ weights[name + "ffn.down_proj.weight"].T


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """Pairs (i, i + head_dim / 2) as complex numbers, each turned by its angle."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones_like(x[:, :half]), position_ids[:, None].to(x.dtype) * frequency)
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)
