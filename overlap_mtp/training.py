"""One optimizer step over context-parallel (and data-parallel) ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine, count_tokens

Microbatch = tuple[Mapping[str, torch.Tensor], SequenceLayout]


def global_counts(
    model: GPT, microbatches: Sequence[Microbatch], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Valid tokens of a step by depth, [1 + num_depths], over all microbatches and ranks of `group` (dp x cp).

    One all-reduce per optimizer step, before the first backward, alike for every schedule.
    """
    depths = model.config.num_depths
    counts = torch.stack(
        [count_tokens(batch, layout, model.cp_rank, depths) for batch, layout in microbatches]
    )
    total = counts.sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sums gradients over the ranks of `group`, in place."""
    if group is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Microbatch],
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Forward and backward of each microbatch, then one update; the loss of the step over all ranks.

    `microbatches`: (batch, layout) with this rank's shards. The exchange of a microbatch runs under its trunk.
    """
    optimizer.zero_grad()
    counts = global_counts(model, microbatches, group)
    total = torch.zeros((), device=counts.device, dtype=torch.float64)
    for batch, layout in microbatches:
        loss = combine(model(batch, layout), counts, model.config.mtp_loss_factor)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if group is not None:
        dist.all_reduce(total, group=group)
    reduce_gradients(model.parameters(), group)
    optimizer.step()
    return total
