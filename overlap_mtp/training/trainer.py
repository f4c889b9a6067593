"""One optimizer step over data-, context- and tensor-parallel ranks, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.gpt import GPT, Starts
from overlap_mtp.model.loss import DraftAcceptance, combine
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, split_loss

Microbatch = tuple[Mapping[str, torch.Tensor], SequenceLayout]
Normalisation = Literal["token", "batch"]


@dataclass(frozen=True)
class TrainConfig:
    """How a run learns."""

    steps: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    final_fraction: float = 0.1  # of the learning rate, where the cosine ends
    clip_norm: float = 1.0
    accumulate: int = 1  # microbatches of a rank in a step
    normalisation: Normalisation = "token"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be in [0, steps = {self.steps}], got {self.warmup_steps}: warm up for less, or "
                "train for longer"
            )
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise ValueError(
                f"learning_rate and clip_norm must be > 0, got {self.learning_rate} and {self.clip_norm}"
            )
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.normalisation not in get_args(Normalisation):
            legal = " or ".join(get_args(Normalisation))
            raise ValueError(f"normalisation must be {legal}, got {self.normalisation!r}")

    def schedule(self, step: int) -> float:
        """The fraction of the learning rate at a step, from 0: linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine


@dataclass(frozen=True)
class StepReport:
    """What a step cost and learned; alike on all ranks.

    Losses are sums over all microbatches, dp and cp ranks over what they are sums of: LM and MTP losses over tokens
    that count (0 where none does), the load-balancing loss over tokens of documents. `loss` is what was minimised.
    """

    loss: float
    lm_loss: float
    mtp_losses: list[float]  # by depth
    aux_loss: float | None  # with experts
    grad_norms: dict[str, float]  # before clipping: of the "model", or of the "trunk" and the "mtp" block
    tokens: int  # of documents
    right: list[float]  # guesses (weighed by the mask) of LM and each depth that were the label
    counted: list[float]  # of so many

    @property
    def acceptance(self) -> list[float | None]:
        """By depth: the share of its tokens that the depth would have drafted right."""
        return shares(self.right, self.counted)[1:]


def shares(right: list[float], counted: list[float]) -> list[float | None]:
    """Of what was counted, how much was right; None where nothing was: documents may be shorter than a depth."""
    return [r / c if c else None for r, c in zip(right, counted, strict=True)]


class NonFiniteLossError(RuntimeError):
    """A loss, or its gradient, was infinite or not a number; no weight was changed by it."""


class Trainer:
    """Takes steps.

    `parallel`: the mesh that the model was parallelized over; None on a single process. `on_phase` is told what comes
    next, alike on all ranks (`Watchdog.phase`).
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        recipe: TrainConfig,
        parallel: ParallelMesh | None = None,
        on_phase: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.optimizer, self.recipe, self.parallel = model, optimizer, recipe, parallel
        self._on_phase = on_phase
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)

    def step(
        self,
        microbatches: Sequence[Microbatch],
        roller: Starts | None = None,
        where: str = "",
        first_batch: int = 0,
    ) -> StepReport:
        """Forward and backward of each microbatch, then one update.

        `microbatches`: (batch, layout) with this rank's shards, as many on every rank. The exchange of a microbatch
        runs under its trunk, by `roller` or the model's own. Raises NonFiniteLossError, on all ranks, naming `where`
        and the batch: counted from `first_batch` in the order of the data, of which dp ranks take one each, then the
        next.
        """
        if len(microbatches) != self.recipe.accumulate:
            raise ValueError(
                f"a step takes recipe.accumulate = {self.recipe.accumulate} microbatches, got {len(microbatches)}"
            )
        for _, layout in microbatches:
            self._check_sizes(layout)
        self.optimizer.zero_grad()
        known = self._table(torch.stack([self._known(*one) for one in microbatches]))
        counts, tokens = known[..., :-1], known[..., -1].sum()
        sums, right = [], []
        for number, (batch, layout) in enumerate(microbatches):
            self._on_phase(f"{where}: microbatch {number}")
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(number == len(microbatches) - 1)
            guesses = DraftAcceptance()
            with split_loss(self.parallel):
                mine = self.model(batch, layout, roller, guesses)
                self._objective(mine, self._denominators(counts, number)).backward()  # type: ignore[no-untyped-call]
            sums.append(mine.detach())
            right.append(torch.stack(guesses.right))
        self._on_phase(f"{where}: losses and update")  # here the host first waits for the device
        table = self._table(torch.cat([torch.stack(sums).double(), torch.stack(right).double()], -1))
        totals, hits = table[..., : counts.shape[-1]], table[..., counts.shape[-1] :]
        self._check_finite(totals, where, first_batch)
        norms = self._clip(where)
        self.optimizer.step()
        self.scheduler.step()
        return self._report(totals, hits, counts, norms, tokens)

    def _check_sizes(self, layout: SequenceLayout) -> None:
        sizes = self.parallel.sizes if self.parallel is not None else ParallelDims()
        if layout.cp_size != sizes.cp:
            raise ValueError(
                f"the layout's cp_size must be the mesh's cp: {layout.cp_size} is not {sizes.cp}"
            )
        sizes.check_length(layout.seq_len, layout.kind)

    def _known(self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        """What is known of a microbatch before its forward: what its losses are divided by, and its tokens."""
        counts = self.model.counts(batch, layout).double()
        tokens = batch["input_ids"].shape[0] * int(layout.valid(self.model.cp_rank).sum())
        return torch.cat([counts, counts.new_tensor([tokens])])

    def _table(self, mine: torch.Tensor) -> torch.Tensor:
        """[microbatches, n] of each rank -> [dp, microbatches, n], summed over cp. One all-reduce."""
        if self.parallel is None:
            return mine[None]
        table = mine.new_zeros((self.parallel.sizes.dp, *mine.shape))
        table[self.parallel.dp_rank] = mine
        dist.all_reduce(table, group=self.parallel.data_group)
        return table

    def _denominators(self, counts: torch.Tensor, number: int) -> torch.Tensor:
        """What the sums of a microbatch are divided by: all tokens of the step, or its own and the microbatches."""
        if self.recipe.normalisation == "token":
            return counts.sum((0, 1))
        dp_rank = self.parallel.dp_rank if self.parallel is not None else 0
        return counts[dp_rank, number] * (counts.shape[0] * counts.shape[1])

    def _objective(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        return combine(
            sums, counts, config.mtp_loss_factor, config.aux_loss_factor if config.num_experts else None
        )

    def _check_finite(self, totals: torch.Tensor, where: str, first_batch: int) -> None:
        bad = ~totals.isfinite()
        if bool(bad.any()):
            dp_rank, number, entry = (int(one) for one in bad.nonzero()[0])
            name = [
                "LM",
                *(f"MTP depth {k + 1}" for k in range(self.model.config.num_depths)),
                "load balancing",
            ]
            batch, value = first_batch + number * len(totals) + dp_rank, float(totals[dp_rank, number, entry])
            raise NonFiniteLossError(
                f"{where or 'this step'}: the {name[entry]} loss of batch {batch} (microbatch {number} of dp rank "
                f"{dp_rank}) is {value}; the weights are those of the step before"
            )

    def _clip(self, where: str) -> dict[str, float]:
        """Clips gradients; their norms before. A detached MTP block is clipped by itself."""
        parts = {"model": list(self.model.parameters())}
        if self.model.config.detach_mtp:
            mtp = list(self.model.mtp.parameters())
            known = {id(parameter) for parameter in mtp}
            parts = {"trunk": [p for p in self.model.parameters() if id(p) not in known], "mtp": mtp}
        norms = {}
        for name, parameters in parts.items():
            norm = clip_grad_norm_(parameters, self.recipe.clip_norm)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            if not math.isfinite(norms[name]):
                raise NonFiniteLossError(
                    f"{where or 'this step'}: the norm of the {name}'s gradients is {norms[name]}, of a loss that is "
                    "finite; the weights are those of the step before"
                )
        return norms

    def _report(
        self,
        totals: torch.Tensor,
        hits: torch.Tensor,
        counts: torch.Tensor,
        norms: dict[str, float],
        tokens: torch.Tensor,
    ) -> StepReport:
        config, depths = self.model.config, self.model.config.num_depths
        step_counts = counts.sum((0, 1))
        means = (totals.sum((0, 1)) / step_counts.clamp(min=1e-300)).tolist()
        if self.recipe.normalisation == "token":
            loss = self._objective(totals.sum((0, 1)), step_counts)
        else:
            flat, each = totals.flatten(0, 1), counts.flatten(0, 1)
            loss = torch.stack([self._objective(s, c) for s, c in zip(flat, each, strict=True)]).mean()
        return StepReport(
            loss=float(loss),
            lm_loss=means[0],
            mtp_losses=means[1 : 1 + depths],
            aux_loss=means[-1] if config.num_experts else None,
            grad_norms=norms,
            tokens=int(tokens),
            right=hits.sum((0, 1)).tolist(),
            counted=step_counts[: 1 + depths].tolist(),
        )


def global_counts(
    model: GPT, microbatches: Sequence[Microbatch], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Valid tokens of a step by loss, [num_sums], over all microbatches and ranks of `group` (dp x cp)."""
    total = torch.stack([model.counts(batch, layout) for batch, layout in microbatches]).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sums the gradients of a model that is not sharded over the ranks of `group`, in place."""
    if group is None:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
