"""Activations on ranks: their rolls and gradients against the definition on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, roll_reference
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, make_activation_roller

from rank_pool import device_of
from strategies import same_bits


def rolled(full: torch.Tensor, layout: SequenceLayout, depth: int) -> torch.Tensor:
    """The definition for [B, S, H]."""
    return roll_reference(full.movedim(1, -1), layout, depth).movedim(-1, 1)


def full_activations(layout: SequenceLayout, names: str, hidden: int, dtype: torch.dtype, seed: int):
    """(tensors by name [2, S, hidden], weights of the loss by name and depth), of different widths."""
    generator = torch.Generator().manual_seed(seed)

    def one(width: int) -> torch.Tensor:
        return torch.randn(2, layout.seq_len, width, generator=generator, dtype=torch.float64).to(dtype)

    return {name: one(hidden + n) for n, name in enumerate(names)}, one


def activations_differ(
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    num_depths: int,
    names: str = "ab",
    hidden: int = 3,
    dtype: torch.dtype = torch.float64,
    seq_dim: int = 1,
    seed: int = 7,
) -> list[str]:
    """All schedules: rolls bit for bit, gradients to 1e-12 (float64), and the same bits from all of them."""
    rank, device = group.rank(), device_of(group)
    full, one = full_activations(layout, names, hidden, dtype, seed)
    weights = {(name, k): one(full[name].shape[-1]) for name in names for k in range(1, num_depths + 1)}
    leaves = {name: tensor.clone().double().requires_grad_() for name, tensor in full.items()}
    loss = sum((rolled(leaves[name], layout, k) * w.double()).sum() for (name, k), w in weights.items())
    loss = loss + sum((leaf * 0).sum() for leaf in leaves.values())
    loss.backward()

    def shard(tensor: torch.Tensor) -> torch.Tensor:
        return layout.shard(tensor, rank, 1).movedim(1, seq_dim).contiguous().to(device)

    wrong, found = [], {}
    for schedule in ACTIVATION_SCHEDULES:
        roller = make_activation_roller(schedule, group, num_depths, max(1, layout.num_documents), seq_dim)
        own = {name: shard(tensor).requires_grad_() for name, tensor in full.items()}
        rolls = roller.start({name: tensor * 1 for name, tensor in own.items()}, layout)
        total = torch.zeros((), device=device, dtype=dtype)
        for k in range(1, num_depths + 1):
            for name, got in rolls.at(k).items():
                if not same_bits(got.detach(), shard(rolled(full[name], layout, k))):
                    wrong.append(f"{schedule}: roll of {name} at depth {k}")
                total = total + (got * shard(weights[name, k])).sum()
        total.backward()
        for name, tensor in own.items():
            want = shard(leaves[name].grad)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 3e-2
            if not torch.allclose(tensor.grad.double(), want, rtol=tolerance, atol=tolerance):
                at = (tensor.grad.double() - want).abs().amax(dim=(1 - seq_dim, 2)).nonzero()[:, 0].tolist()
                wrong.append(f"{schedule}: gradient of {name} at rows {at}")
            found.setdefault(name, []).append(tensor.grad)
        roller.close()
    for name, gradients in found.items():
        if not all(same_bits(gradients[0], other) for other in gradients[1:]):
            wrong.append(f"gradients of {name} differ between schedules")
    return wrong
