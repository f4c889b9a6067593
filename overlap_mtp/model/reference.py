"""The definition of the model's loss: the full batch on one process, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.gpt import GPT

# By layer: for each document the router's probabilities [tokens, E] and the chosen experts [tokens, k]. Tokens of a
# depth that lie past the end of the document are left out.
Routed = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]


def loss_reference(model: GPT, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
    """Return the loss of the full batch with the model's parameters, computed one document at a time.

    It shares no code with the model: it applies formulas to the parameters, with explicit softmax and with Python
    slices as rolls. The gradients of context-parallel ranks must sum to its gradients.

    Args:
        model: gives the parameters and the configuration.
        batch: what `GPT.forward` takes, of all ranks together: [B, S] each.
        layout: the layout of the batch.

    Returns:
        A scalar.
    """
    weights = dict(model.named_parameters())
    config = model.config
    ahead = int(config.derive_labels)  # labels are then the ids that follow
    sums = [torch.zeros((), dtype=model.embedding.weight.dtype) for _ in range(1 + config.num_depths)]
    counts = [0.0] * (1 + config.num_depths)
    routed: Routed = {}
    for row in range(batch["input_ids"].shape[0]):
        for start, length in zip(layout.cu_seqlens[:-1].tolist(), layout.valid_lengths.tolist(), strict=True):
            document = {name: tensor[row, start : start + length] for name, tensor in batch.items()}
            if length <= 0:
                continue
            mask = document.get("loss_mask", torch.ones(length))
            labels = document["input_ids" if config.derive_labels else "labels"].long()
            for k, hidden in enumerate(_hidden_by_depth(model, weights, document, routed)):
                if length <= k + ahead:
                    continue
                head = weights["head.weight"].detach() if k and config.detach_mtp else weights["head.weight"]
                target, weight = labels[k + ahead :], mask[k : length - ahead]
                kept = (weight != 0) & (target != config.ignore_index)
                log_p = (hidden[: length - k - ahead][kept] @ head.T).log_softmax(-1)
                weight = weight[kept].to(log_p.dtype)
                sums[k] = sums[k] - (log_p.gather(-1, target[kept, None])[:, 0] * weight).sum()
                counts[k] += float(weight.sum())
    means = [total / (count or 1.0) for total, count in zip(sums, counts, strict=True)]
    loss = means[0] + config.mtp_loss_factor / config.num_depths * torch.stack(means[1:]).sum()
    if routed:
        loss = loss + config.aux_loss_factor * torch.stack([_balance(one) for one in routed.values()]).mean()
    return loss


def _balance(tokens: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
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


def _hidden_by_depth(
    model: GPT,
    weights: Mapping[str, torch.Tensor],
    document: Mapping[str, torch.Tensor],
    routed: Routed,
) -> list[torch.Tensor]:
    """Return the normalised hidden states [length, hidden] of the trunk and of each depth, for one document."""
    config, ids = model.config, document["input_ids"].long()
    embedding, positions = weights["embedding.weight"], document["position_ids"]
    hidden = embedding[ids]
    for layer in range(config.num_layers):
        hidden = _decoder_layer(model, weights, f"layers.{layer}.", hidden, positions, (routed, layer, 0))
    states = [_rms_norm(hidden, weights["norm.weight"], config.norm_eps)]
    if config.detach_mtp:
        hidden, embedding = hidden.detach(), embedding.detach()
    for depth in range(config.num_depths):
        name = f"mtp.depths.{0 if config.repeat_mtp_layer else depth}."
        ids = torch.cat([ids[1:], ids.new_zeros(1)])
        both = [
            _rms_norm(embedding[ids], weights[name + "enorm.weight"], config.norm_eps),
            _rms_norm(hidden, weights[name + "hnorm.weight"], config.norm_eps),
        ]
        hidden = torch.cat(both, -1) @ weights[name + "eh_proj.weight"].T
        at = (routed, config.num_layers + depth, depth + 1)
        hidden = _decoder_layer(model, weights, name + "layer.", hidden, positions, at)
        states.append(_rms_norm(hidden, weights[name + "norm.weight"], config.norm_eps))
    return states


def _decoder_layer(
    model: GPT,
    weights: Mapping[str, torch.Tensor],
    name: str,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    at: tuple[Routed, int, int],  # what to add to, which layer, and its depth
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


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2), seen as complex numbers, by their angles."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones_like(x[:, :half]), position_ids[:, None].to(x.dtype) * frequency)
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)
