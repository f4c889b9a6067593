"""A training run small enough to checkpoint a thousand times, at the sizes (fsdp, tp)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
    """A training run at the sizes (fsdp, tp); at (1, 1) with no group, plain tensors."""

    def __init__(
        self,
        sizes: tuple[int, int],
        device: str = "cpu",
        seed: int = 0,
        dropout: float = 0.0,
        hidden: int = HIDDEN,
    ) -> None:
        torch.manual_seed(seed)
        self.step, self.fsdp_rank, self.sizes, self.device = 0, 0, sizes, device
        self.model = Tiny(hidden, dropout).to(device)
        if dist.is_initialized() and dist.get_world_size() == sizes[0] * sizes[1]:
            mesh = dist.init_device_mesh(device, sizes, mesh_dim_names=("fsdp", "tp"))
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
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(1000 + self.fsdp_rank)  # for dropout

    def train(self, steps: int) -> list[float]:
        """The losses, of the whole batch."""
        return [self.train_step() for _ in range(steps)]

    def train_step(self) -> float:
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
        """Everything that training changes but random generators, whole. Collective."""
        found = weights_and_moments(self.model, self.optimizer)
        rates = [group["lr"] for group in self.optimizer.param_groups] + self.scheduler.get_last_lr()
        found["rates"] = torch.tensor([*rates, self.scheduler.last_epoch], dtype=torch.float64)
        return {name: whole(value) for name, value in found.items()}

    def evaluate(self) -> None:
        """After which FSDP2 holds the whole parameters."""
        with torch.no_grad():
            self.model(torch.zeros(BATCH, LENGTH, dtype=torch.long, device=self.device))

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        return self.model, self.optimizer, self.scheduler

    def save(self, checkpoints: Checkpoints) -> Path:
        return checkpoints.save(self.step, *self.parts(), {"samples": BATCH * self.step}, IDENTITY)

    def load(self, checkpoints: Checkpoints, path: Path | None = None) -> dict:
        progress = checkpoints.load(*self.parts(), IDENTITY, path)
        self.step = progress["step"]
        return progress


def weights_and_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """By name, as they are on this rank."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: parameter for parameter, name in names.items()}
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


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_sizes(folder: Path, sizes: tuple[int, int], keep: int = 3) -> Checkpoints:
    return Checkpoints(folder, keep, sizes={"fsdp": sizes[0], "tp": sizes[1]})


def on_ranks(pool, case, sizes, *args):
    """The case's results by rank; at (1, 1) in this process."""
    count = sizes[0] * sizes[1]
    return [case(None, sizes, *args)] if count == 1 else pool.run(case, count, sizes, *args)


def error_in(function, run):
    """(class, message) of a load or save that must fail and change nothing."""
    before = run.state(), torch.get_rng_state().numpy()
    try:
        function()
    except CheckpointError as error:
        assert_same(run.state(), before[0])
        np.testing.assert_array_equal(torch.get_rng_state().numpy(), before[1])
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def assert_all_say(errors, words):
    assert len(set(errors)) == 1, "ranks raise alike"
    for word in words:
        assert word in errors[0][1]
