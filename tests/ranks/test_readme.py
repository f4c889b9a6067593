"""The examples of the pages run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from overlap_mtp import SequenceLayout, roll_reference

from rank_pool import RankPool

ROOT = Path(__file__).parents[2]
VOCAB, HIDDEN = 40, 8


class MTPLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.merge(torch.cat([hidden, embedded], -1)))


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def run_example(group: dist.ProcessGroup) -> tuple[float, torch.Tensor]:
    """Loss and the embedding's gradient, summed over ranks."""
    (code,) = [block for block in blocks_of("README.md") if "make_roller" in block]
    torch.manual_seed(0)
    names = {
        "cp_group": group,
        "documents": [torch.arange(length) * 7 % VOCAB for length in (9, 30, 2, 17)],
        "embedding": nn.Embedding(VOCAB, HIDDEN),
        "trunk": nn.Linear(HIDDEN, HIDDEN),
        "mtp_layers": [MTPLayer(), MTPLayer()],
        "head": nn.Linear(HIDDEN, VOCAB),
    }
    exec(code, names)
    loss, gradient = names["loss"].detach().double(), names["embedding"].weight.grad
    dist.all_reduce(loss, group=group)
    dist.all_reduce(gradient, group=group)
    names["roller"].close()
    return loss.item(), gradient


def test_the_example_gives_the_same_loss_on_any_number_of_ranks(pool: RankPool):
    loss, gradient = pool.run(run_example, 2)[0]
    assert 3 < loss < 7  # log(40), and 0.3 of as much
    for cp_size in (3, 8):
        for other_loss, other_gradient in pool.run(run_example, cp_size):
            assert abs(other_loss - loss) < 1e-5
            torch.testing.assert_close(other_gradient, gradient)


def run_integration(group: dist.ProcessGroup) -> list[str]:
    """What is wrong with what the blocks leave."""
    model = nn.Linear(1, 1, bias=False)
    names: dict[str, Any] = {"cp_group": group, "model": model}
    for code in blocks_of("docs/integration.md"):
        exec(code, names)
    rank, layout, rolled = group.rank(), names["layout"], names["rolled"]
    names["model"](torch.ones(1, 1)).sum().backward()  # each rank's gradient is 1
    defined = layout.shard(roll_reference(names["tokens"][None], layout, 1), rank)
    valid = torch.from_numpy(layout.valid(rank, 1))
    checks = {
        "next tokens": torch.equal(names["next_tokens"], defined),
        "timed": torch.equal(rolled["input_ids"], defined),
        "labels": torch.equal(rolled["labels"][0] != -100, valid),
        "positions": names["position_ids"].max() < 16 * group.size(),
        "gradient": names["model"].weight.grad.full_tensor().item() == group.size(),
        "cost": names["cost"].host_us > 0,
        "prepared": torch.equal(names["same_tokens"], defined),
        "block": torch.equal(names["depths"][0].tokens["labels"], rolled["labels"]),
        "logits": len(names["logits"]) == 2,
    }
    names["roller"].close()
    return [name for name, is_right in checks.items() if not is_right]


def test_the_integration_page_gives_the_defined_rolls_and_a_sum_of_gradients(pool: RankPool):
    assert pool.run(run_integration, 8) == [[]] * 8


def run_activations(group: dist.ProcessGroup) -> tuple[float, list[torch.Tensor]]:
    """Loss and all gradients of the blocks, summed over ranks."""
    layout = SequenceLayout.packed([0, 32, 48, 96], group.size(), valid_lengths=[30, 16, 41])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (1, layout.seq_len), generator=generator)
    features = torch.randn(1, layout.seq_len, HIDDEN, generator=generator)
    torch.manual_seed(0)
    modules = {
        "embedding": nn.Embedding(VOCAB, HIDDEN),
        "trunk": nn.Linear(HIDDEN, HIDDEN),
        "mtp_layers": nn.ModuleList([MTPLayer(), MTPLayer()]),
        "norm": nn.RMSNorm(HIDDEN),
        "head": nn.Linear(HIDDEN, VOCAB),
    }
    names: dict[str, Any] = {
        **modules,
        "cp_group": group,
        "layout": layout,
        "ids": layout.shard(ids, group.rank()),
        "image_features": layout.shard(features, group.rank(), dim=1),
        "step": 7,
        "is_image": layout.shard(ids % 5 == 0, group.rank()),
        "num_tokens": int(layout.valid_lengths.sum()),
    }
    for code in blocks_of("docs/activations.md"):
        exec(code, names)
    sums = [names["loss"].detach().double(), *(p.grad for one in modules.values() for p in one.parameters())]
    for one in sums:
        dist.all_reduce(one, group=group)
    for roller in ("roller", "older", "teacher"):
        names[roller].close()
    return sums[0].item(), sums[1:]


def test_the_page_of_activations_gives_the_same_gradients_on_any_number_of_ranks(pool: RankPool):
    loss, gradients = pool.run(run_activations, 2)[0]
    assert 0 < loss < 2  # of two depths, each at most 1
    for cp_size in (4, 8):
        for other_loss, others in pool.run(run_activations, cp_size):
            assert abs(other_loss - loss) < 1e-5
            torch.testing.assert_close(others, gradients)
