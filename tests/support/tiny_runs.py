"""A training run small enough to checkpoint a thousand times, at the sizes (fsdp, tp)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from overlap_mtp.training.checkpoint import CheckpointError, Checkpoints

from rank_pool import device_of

VOCAB, HIDDEN, INNER, BATCH, LENGTH = 26, 12, 20, 8, 8  # 26 and 20 do not divide by every size
IDENTITY = {"hidden_size": HIDDEN, "layers": [1, 2]}


class Tiny(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.norm = nn.RMSNorm(hidden)
        self.up = nn.Linear(hidden, INNER)
        self.down = nn.Linear(INNER, VOCAB, bias=False)
        self.spare = nn.Parameter(torch.ones(3))  # it never has a gradient: AdamW has no state for it
        self.dropout = dropout

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.up(self.norm(self.embedding(ids))))
        return self.down(nn.functional.dropout(inner, self.dropout)).clone()  # FSDP2 warns of views


class Run:
    """A training run at the sizes (fsdp, tp). At (1, 1) it has plain tensors, whatever the group."""

    def __init__(
        self, sizes=(1, 1), group=None, seed: int = 0, dropout: float = 0.0, hidden: int = HIDDEN
    ) -> None:
        torch.manual_seed(seed)
        self.step, self.fsdp_rank, self.sizes, self.group = 0, 0, sizes, group
        self.device = torch.device("cpu") if group is None else device_of(group)
        self.model = Tiny(hidden, dropout).to(self.device)
        if dist.is_initialized() and dist.get_world_size() == sizes[0] * sizes[1]:
            mesh = dist.init_device_mesh(self.device.type, sizes, mesh_dim_names=("fsdp", "tp"))
            self.fsdp_rank = mesh["fsdp"].get_local_rank()
            plan = {
                "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(),
            }
            if sizes[1] > 1:
                parallelize_module(self.model, mesh["tp"], plan)
            fully_shard(self.model, mesh=mesh["fsdp"])
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimize_by(torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)))
        torch.manual_seed(1000 + self.fsdp_rank)  # for dropout

    def optimize_by(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(self, steps: int = 1) -> list[float]:
        """Return the losses of the whole batch."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        generator = torch.Generator().manual_seed(self.step)
        batch = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        batch = batch.chunk(self.sizes[0])[self.fsdp_rank].to(self.device)
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        total = loss.detach().clone()
        if self.sizes[0] > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total.item()

    def state(self) -> dict[str, np.ndarray]:
        """Return all that training changes but random generators, unsharded. Collective."""
        found = weights_and_moments(self.model, self.optimizer)
        rates = [group["lr"] for group in self.optimizer.param_groups] + self.scheduler.get_last_lr()
        found["rates"] = torch.tensor([*rates, self.scheduler.last_epoch], dtype=torch.float64)
        return {name: whole(value) for name, value in found.items()}

    def evaluate(self) -> None:
        """FSDP2 holds the whole parameters afterwards."""
        with torch.no_grad():
            self.model(torch.zeros(BATCH, LENGTH, dtype=torch.long, device=self.device))

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.model, self.optimizer, self.scheduler

    def checkpoints(self, folder: Path, keep: int = 3) -> Checkpoints:
        group = self.group if self.sizes == (1, 1) else None
        return Checkpoints(folder, keep, sizes={"fsdp": self.sizes[0], "tp": self.sizes[1]}, group=group)

    def save(self, folder: Path, keep: int = 3) -> Path:
        progress = {"samples": BATCH * self.step}
        return self.checkpoints(folder, keep).save(self.step, *self.parts(), progress, IDENTITY)

    def load(self, folder: Path, path: Path | None = None) -> dict:
        progress = self.checkpoints(folder).load(*self.parts(), IDENTITY, path)
        self.step = progress["step"]
        return progress

    def error_in(self, function) -> tuple[str, str]:
        """Return (class, message) of a load or save that must fail and change nothing."""
        before = self.state(), torch.get_rng_state().numpy()
        error = self.error_of(function)
        assert_same(self.state(), before[0])
        np.testing.assert_array_equal(torch.get_rng_state().numpy(), before[1])
        return error

    def error_of(self, function) -> tuple[str, str]:
        """Return (class, message) of a load or save that must fail."""
        with pytest.raises(CheckpointError) as caught:
            function()
        return caught.typename, str(caught.value)


def weights_and_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return them by name, as they are on this rank."""
    found = dict(model.named_parameters())
    names = {parameter: name for name, parameter in found.items()}
    for parameter, values in optimizer.state.items():
        found.update({f"{names[parameter]}.{what}": value for what, value in values.items()})
    return found


def whole(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().numpy().copy()


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_all_say(errors: list[tuple[str, str]], words: list[str]) -> None:
    assert len(set(errors)) == 1, "all ranks raise the same error"
    for word in words:
        assert word in errors[0][1]


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def on_ranks(pool, case, sizes, *args):
    """Return the case's results by rank; at (1, 1), in this process."""
    count = sizes[0] * sizes[1]
    return [case(None, sizes, *args)] if count == 1 else pool.run(case, count, sizes, *args)


def save_after_three(group, sizes, folder):
    run = Run(sizes, group)
    run.train(3)
    run.evaluate()
    run.save(folder)
    return run.state(), run.train(3)


def load_and_continue(group, sizes, folder):
    run = Run(sizes, group, seed=1)
    run.train()  # loading must replace this state
    run.evaluate()
    torch.rand(7)
    random_state = torch.get_rng_state()
    progress = run.load(folder)
    left_alone = torch.equal(random_state, torch.get_rng_state())
    return progress, run.state(), run.train(3), left_alone


def assert_loads_at(pool, all_sizes, saved_at, folder):
    expected, losses = on_ranks(pool, save_after_three, saved_at, folder)[0]
    for sizes in all_sizes:
        for progress, state, found, left_alone in on_ranks(pool, load_and_continue, sizes, folder):
            assert progress == {"step": 3, "samples": 3 * BATCH}
            assert_same(state, expected)
            assert found == pytest.approx(losses, rel=1e-6)
            assert left_alone == (sizes != saved_at), "random generators change only at the same sizes"
