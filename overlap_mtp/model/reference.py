"""The definition of the model's loss: the full batch on one process, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.reference_layers import Routed, balance, decoder_layer, rms_norm

BITS = 2**64 - 1


def loss_reference(
    model: GPT,
    batch: Mapping[str, torch.Tensor],
    layout: SequenceLayout,
    mixing_keys: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the loss of the full batch with the model's parameters, computed one document at a time.

    It shares no code with the model: it applies formulas to the parameters, with explicit softmax and with Python
    slices as rolls. The gradients of context-parallel ranks must sum to its gradients.

    Args:
        model: gives the parameters and the configuration.
        batch: what `GPT.forward` takes, of all ranks together: [B, S] each.
        layout: the layout of the batch.
        mixing_keys: if hidden states are mixed, a key for each row, in [0, 2^64). Default: zeros.

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
            key = 0 if mixing_keys is None else mixing_keys[row]
            states = _hidden_by_depth(model, weights, document, routed, key, start)
            for k, hidden in enumerate(states):
                if length <= k + ahead:
                    continue
                head = weights["head.weight"].detach() if k and config.detach_mtp else weights["head.weight"]
                target, weight = labels[k + ahead :], mask[k : length - ahead]
                kept = (weight != 0) & (target != config.ignore_index)
                log_p = (hidden[: length - k - ahead][kept] @ head.T).log_softmax(-1)
                weight = weight[kept].to(log_p.dtype)
                sums[k] = sums[k] - (log_p.gather(-1, target[kept, None])[:, 0] * weight).sum()
                if k and config.distillation != "none":
                    same_target = states[0][k : length - ahead][kept]
                    distances = _distances(config, log_p, same_target, weights["head.weight"])
                    sums[k] = sums[k] + config.distillation_weight * (distances * weight).sum()
                counts[k] += float(weight.sum())
    means = [total / (count or 1.0) for total, count in zip(sums, counts, strict=True)]
    loss = means[0] + config.mtp_loss_factor / config.num_depths * torch.stack(means[1:]).sum()
    if routed:
        loss = loss + config.aux_loss_factor * torch.stack([balance(one) for one in routed.values()]).mean()
    return loss


def _distances(
    config: ModelConfig, log_p: torch.Tensor, trunk: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """Return each token's distance of a depth's prediction from the trunk's, [tokens]."""
    teacher = trunk @ head.T
    if config.distillation_detach:
        teacher = teacher.detach()
    log_q = teacher.log_softmax(-1)
    if config.distillation == "tv":
        return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _hidden_by_depth(
    model: GPT,
    weights: Mapping[str, torch.Tensor],
    document: Mapping[str, torch.Tensor],
    routed: Routed,
    key: int,
    start: int,
) -> list[torch.Tensor]:
    """Return the normalised hidden states [length, hidden] of the trunk and of each depth, for one document.

    `key` is that of the document's row, and `start` is where the document begins there.
    """
    config, ids, positions = model.config, document["input_ids"].long(), document["position_ids"]
    embedding, eps = weights["embedding.weight"], config.norm_eps
    hidden = embedded = embedding[ids]
    for layer in range(config.num_layers):
        hidden = decoder_layer(config, weights, f"layers.{layer}.", hidden, positions, (routed, layer, 0))
    states = [rms_norm(hidden, weights["norm.weight"], eps)]
    if config.detach_mtp:
        hidden, embedding, embedded = hidden.detach(), embedding.detach(), embedded.detach()
    born = [hidden]
    for depth in range(1, config.num_depths + 1):
        name = f"mtp.depths.{0 if config.repeat_mtp_layer else depth - 1}."
        has_ids = config.mtp_inputs == "ids"
        inputs = embedding[_ahead(ids, depth)] if has_ids else _ahead(embedded, depth)
        if config.hidden_state_mixing and model.training:
            candidates = [_ahead(one, depth - 1 - number) for number, one in enumerate(born)]
            chosen = [_hash(key, start + at, depth) % 2**31 % depth for at in range(len(ids))]
            hidden = torch.stack([candidates[number][at] for at, number in enumerate(chosen)])
        both = [
            rms_norm(inputs, weights[name + "enorm.weight"], eps),
            rms_norm(hidden, weights[name + "hnorm.weight"], eps),
        ]
        hidden = torch.cat(both, -1) @ weights[name + "eh_proj.weight"].T
        at = (routed, config.num_layers + depth - 1, depth)
        hidden = decoder_layer(config, weights, name + "layer.", hidden, positions, at)
        born.append(hidden)
        states.append(rms_norm(hidden, weights[name + "norm.weight"], eps))
    return states


def _ahead(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows `count` further on; 0 past the end."""
    return torch.cat([rows[count:], torch.zeros_like(rows[:count])])


def _hash(*words: int) -> int:
    """Return the hash of some words that `overlap_mtp.model.mixing` defines, in plain integers."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & BITS
        state ^= state >> 31
    return state
