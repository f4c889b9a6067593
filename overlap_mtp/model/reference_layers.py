"""One decoder layer in plain torch, for `overlap_mtp.model.reference`: explicit softmax, one document at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overlap_mtp.model.config import ModelConfig

# By layer: for each document the router's probabilities [tokens, E] and the chosen experts [tokens, k]. Tokens of a
# depth that lie past the end of the document are left out.
Routed = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]


def decoder_layer(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    name: str,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    at: tuple[Routed, int, int],  # what to add to, which layer, and its depth
) -> torch.Tensor:
    """Return the hidden states [length, hidden] that the layer makes of `x`."""
    length, head_dim = x.shape[0], config.head_dim
    normed = rms_norm(x, weights[name + "attention_norm.weight"], config.norm_eps)
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
    normed = rms_norm(x, weights[name + "ffn_norm.weight"], config.norm_eps)
    suffix = "" if config.num_experts else ".weight"
    parts = [weights[f"{name}ffn.{part}{suffix}"] for part in ("gate_proj", "up_proj", "down_proj")]
    if not config.num_experts:
        return x + _swiglu(normed, *parts)
    probabilities = (normed @ weights[name + "ffn.router"].T).softmax(-1)
    chosen = probabilities.argsort(-1, descending=True)[:, : config.experts_per_token]
    routed, layer, depth = at
    there = max(length - depth, 0)  # the tokens of this depth
    routed.setdefault(layer, []).append((probabilities[:there], chosen[:there]))
    rows = []
    for token in range(length):
        share = probabilities[token, chosen[token]]
        outs = [_swiglu(normed[token], *(part[expert] for part in parts)) for expert in chosen[token]]
        rows.append((share / share.sum()) @ torch.stack(outs))
    return x + torch.stack(rows)


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    inner = x @ gate.T
    return (inner * inner.sigmoid() * (x @ up.T)) @ down.T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2), seen as complex numbers, by their angles."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones_like(x[:, :half]), position_ids[:, None].to(x.dtype) * frequency)
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def balance(tokens: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return Switch Transformer's load-balancing loss of one layer, over all tokens in its statistics."""
    probabilities = torch.cat([one for one, _ in tokens])
    chosen = torch.cat([one for _, one in tokens])
    num_experts = probabilities.shape[1]
    loss = probabilities.new_zeros(())
    if not len(probabilities):
        return loss
    for expert in range(num_experts):
        loss = loss + (chosen == expert).double().mean() * probabilities[:, expert].mean()
    return num_experts * loss
