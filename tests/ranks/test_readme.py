"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from rank_pool import RankPool

ROOT = Path(__file__).parents[2]
VOCAB, HIDDEN = 40, 8


class MTPLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.merge(torch.cat([hidden, embedded], -1)))


def run_example(group: dist.ProcessGroup) -> tuple[float, torch.Tensor]:
    """Loss and the embedding's gradient, summed over ranks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "make_roller" in block]
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
