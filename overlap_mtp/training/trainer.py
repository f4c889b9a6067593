"""One optimizer step over data-, context- and tensor-parallel ranks, and its report."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import DraftAcceptance, combine
from overlap_mtp.model.mixing import mixing_keys
from overlap_mtp.schedules.roller import Roller
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.training.flops import attention_pairs, step_flops
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, split_loss

Microbatch = tuple[Mapping[str, torch.Tensor], SequenceLayout]
Normalisation = Literal["token", "batch"]


@dataclass(frozen=True)
class TrainConfig:
    """Length, learning rate and loss normalisation of a run."""

    steps: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    final_fraction: float = 0.1  # of the learning rate, at the end of the cosine
    clip_norm: float = 1.0
    normalisation: Normalisation = "token"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be in [0, steps = {self.steps}], got {self.warmup_steps}: warm up for less, or "
                "train for longer"
            )
        if not 0 < self.learning_rate <= 1:  # one AdamW step moves a weight by about the learning rate
            raise ValueError(f"learning_rate must be in (0, 1], got {self.learning_rate}")
        if not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ValueError(f"clip_norm must be finite and > 0, got {self.clip_norm}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.normalisation not in get_args(Normalisation):
            legal = " or ".join(get_args(Normalisation))
            raise ValueError(f"normalisation must be {legal}, got {self.normalisation!r}")

    def schedule(self, step: int) -> float:
        """Return the fraction of the learning rate at a step (from 0): linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine


@dataclass(frozen=True)
class StepReport:
    """Losses, gradient norms and draft acceptance of a step; the same on all ranks.

    Each loss is a sum over all microbatches, dp and cp ranks, divided by the number of its tokens. LM and MTP losses
    are over tokens that count (None if none does), the load-balancing loss is over tokens of documents.
    """

    loss: float  # that was minimised
    lm_loss: float | None
    mtp_losses: list[float | None]  # by depth
    aux_loss: float | None  # with experts
    grad_norms: dict[str, float]  # before clipping: of the "model", or of the "trunk" and the "mtp" block
    tokens: int  # of documents
    flops: int  # of the model (`overlap_mtp.training.flops`), over all ranks
    right: list[float]  # weight of the tokens that were predicted right, by LM and by each depth
    counted: list[float]  # weight of all tokens

    @property
    def acceptance(self) -> list[float | None]:
        """By depth: the share of tokens that the depth would have drafted right."""
        return shares(self.right, self.counted)[1:]


def shares(sums: list[float], counts: list[float]) -> list[float | None]:
    """Divide sums by counts; None if a count is 0, as when documents are shorter than a depth."""
    return [one / count if count else None for one, count in zip(sums, counts, strict=True)]


class NonFiniteLossError(RuntimeError):
    """A loss or its gradient is infinite or not a number; it changed no weight."""


class Trainer:
    """Take optimizer steps.

    Args:
        model: parallelized over `parallel`.
        optimizer: of the model's parameters.
        config: length, learning rate and loss normalisation.
        parallel: the mesh; None on a single process.
        on_phase: is told what comes next, at the same places on all ranks (`Watchdog.phase`).
        seed: of the mixing of hidden states, the same on all ranks, in [0, 2^63 - 1].
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        parallel: ParallelMesh | None = None,
        on_phase: Callable[[str], None] = lambda text: None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer, self.config, self.parallel = model, optimizer, config, parallel
        self._on_phase, self._seed = on_phase, seed
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.schedule)
        self._is_half_done = False  # FSDP2 holds gradients that `zero_grad` does not reach

    def step(
        self,
        microbatches: Sequence[Microbatch],
        roller: Roller | TimedRoller | None = None,
        where: str = "",
        first_batch: int = 0,
    ) -> StepReport:
        """Run forward and backward of each microbatch, then update the weights once. Collective.

        Args:
            microbatches: pairs (this rank's shards of a batch, its layout). Steps may take different numbers of them,
                for example as many as hold a number of tokens. In one step all ranks take the same number, because
                every rank holds a part of the parameters that each microbatch needs.
            roller: starts the exchange of each microbatch. Default: the model's own.
            where: names the step in errors and phases.
            first_batch: number of the step's first batch, for errors: dp ranks take one each, then the next.

        Raises:
            NonFiniteLossError: on all ranks, naming the step, the loss and the batch.
            RuntimeError: if an exchange of this step failed (`Roller.raise_if_failed`), or an earlier step of a sharded
                model ended between its microbatches. No weight has changed.
            ValueError: if there are no microbatches or other numbers of them on other ranks, tp ranks have other
                layouts (or names of batches, `SequenceLayout.of_batch`), or a layout does not suit the mesh.
        """
        if self._is_half_done:
            raise RuntimeError(
                "an earlier step ended between its microbatches, and its gradients are still in the model: build the "
                "model again and load a checkpoint"
            )
        self._check_same_on_all_ranks([layout for _, layout in microbatches])
        dims = self.parallel.dims if self.parallel is not None else ParallelDims()
        for _, layout in microbatches:
            if layout.cp_size != dims.cp:
                raise ValueError(
                    f"the layout's cp_size must be the mesh's cp = {dims.cp}, got {layout.cp_size}"
                )
            dims.check_local_length(layout.local_len)
        self.optimizer.zero_grad()
        weights = self._table(torch.stack([self._weights(*one) for one in microbatches]))
        counts, sizes = weights[..., :-2], weights[..., -2:].sum((0, 1))
        sums, right = [], []
        for number, (batch, layout) in enumerate(microbatches):
            self._on_phase(f"{where}: microbatch {number}")
            is_last = number == len(microbatches) - 1
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(is_last)
            acceptance = DraftAcceptance()
            with split_loss(self.parallel):
                mine = self.model(batch, layout, roller, acceptance, self._mixing_keys(batch, number))
                loss = self._objective(mine, self._denominators(counts, number))
                self._is_half_done |= isinstance(self.model, FSDPModule) and not is_last
                loss.backward()  # type: ignore[no-untyped-call]
            sums.append(mine.detach())
            right.append(torch.stack(acceptance.right))
        self._is_half_done = False
        self._on_phase(f"{where}: losses and update")  # here the host waits for the device
        table = self._table(torch.cat([torch.stack(sums).double(), torch.stack(right).double()], -1))
        totals, hits = table.tensor_split([counts.shape[-1]], -1)
        if roller is not None:  # no wrong token may change a weight
            roller.raise_if_failed()
        self.model.mtp.raise_if_failed()
        self._check_finite(totals, where, first_batch)
        norms = self._clip(where)
        self.optimizer.step()
        self.scheduler.step()
        return self._report(totals, hits, counts, norms, sizes)

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next step, after loading a checkpoint whose run had another length."""
        last_epoch, rates = self.scheduler.last_epoch, self.scheduler.base_lrs
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.config.schedule(last_epoch)

    def _check_same_on_all_ranks(self, layouts: Sequence[SequenceLayout]) -> None:
        """Compare the number of microbatches, and between tp ranks the layouts and names of batches, too."""
        most, least, differ = len(layouts), len(layouts), 0
        if self.parallel is not None:
            device = next(self.model.parameters()).device
            mark = zlib.crc32(repr([(one.checksum, one.batch) for one in layouts]).encode())
            bounds = torch.tensor([most, -least, mark, -mark], device=device)
            if self.parallel.dims.tp > 1:
                dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.parallel.tp_group)
            # Ranks of other tp groups learn whether one differs: all ranks raise, or none.
            bounds = torch.stack([bounds[0], bounds[1], bounds.sum()])
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.parallel.data_group)
            most, least, differ = int(bounds[0]), -int(bounds[1]), int(bounds[2])
        if differ:
            raise ValueError(
                "tp ranks share their tokens: give them the same batches, got other numbers, layouts or names of "
                "batches on some"
            )
        if least < 1 or most > least:
            raise ValueError(
                f"a step takes at least 1 microbatch, and the same number on all ranks, got {least} to {most}: keep "
                "what some ranks have more for their next step"
            )

    def _weights(self, batch: Mapping[str, torch.Tensor], layout: SequenceLayout) -> torch.Tensor:
        """Return this rank's counts of a microbatch's losses, tokens and pairs of attention, [num_sums + 2]."""
        counts = self.model.counts(batch, layout).double()
        rows, cp_rank = batch["input_ids"].shape[0], self.model.cp_rank
        pairs = 0 if cp_rank else attention_pairs(layout)  # of the whole sequence
        sizes = [rows * int(layout.valid(cp_rank).sum()), rows * pairs]
        return torch.cat([counts, counts.new_tensor(sizes)])

    def _table(self, mine: torch.Tensor) -> torch.Tensor:
        """Gather [microbatches, n] of each rank to [dp, microbatches, n], summed over cp, by one all-reduce."""
        if self.parallel is None:
            return mine[None]
        table = mine.new_zeros((self.parallel.dims.dp, *mine.shape))
        table[self.parallel.dp_rank] = mine
        dist.all_reduce(table, group=self.parallel.data_group)
        return table

    def _denominators(self, counts: torch.Tensor, number: int) -> torch.Tensor:
        """Return the divisors of a microbatch's sums: tokens of the step, or its own times the microbatches."""
        if self.config.normalisation == "token":
            return counts.sum((0, 1))
        dp_rank = self.parallel.dp_rank if self.parallel is not None else 0
        return counts[dp_rank, number] * (counts.shape[0] * counts.shape[1])

    def _mixing_keys(self, batch: Mapping[str, torch.Tensor], number: int) -> torch.Tensor | None:
        """Return a key for each row of a microbatch, if hidden states are mixed.

        They follow from the seed, the step, and the row's place in the step: dp ranks take a batch each, then the next.
        """
        if not self.model.config.hidden_state_mixing:
            return None
        dp, dp_rank = (self.parallel.dims.dp, self.parallel.dp_rank) if self.parallel is not None else (1, 0)
        ids, step = batch["input_ids"], self.scheduler.last_epoch
        return mixing_keys(self._seed, step, number * dp + dp_rank, ids.shape[0], ids.device)

    def _objective(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        aux_loss_factor = config.aux_loss_factor if config.num_experts else None
        return combine(sums, counts, config.mtp_loss_factor, aux_loss_factor)

    def _check_finite(self, totals: torch.Tensor, where: str, first_batch: int) -> None:
        bad = ~totals.isfinite()
        if bool(bad.any()):
            dp_rank, number, entry = (int(one) for one in bad.nonzero()[0])
            depths = [f"MTP depth {k + 1}" for k in range(self.model.config.num_depths)]
            name = ["LM", *depths, "load balancing"][entry]
            batch, value = first_batch + number * len(totals) + dp_rank, float(totals[dp_rank, number, entry])
            raise NonFiniteLossError(
                f"{where or 'this step'}: the {name} loss of batch {batch} (microbatch {number} of dp rank {dp_rank}) "
                f"is {value}; {self._weights_now()}"
            )

    def _weights_now(self) -> str:
        """Say what an error leaves behind. Collective: all ranks raise it."""
        bad = (
            torch.stack([(~_part_of_rank(one).isfinite()).any() for one in self.model.parameters()])
            .any()
            .int()
        )
        for group in self.parallel.groups if self.parallel is not None else ():
            dist.all_reduce(bad, group=group)
        if bad:
            return "an earlier step has left weights that are not finite: resume from a checkpoint before it"
        return "the weights are those of the step before"

    def _clip(self, where: str) -> dict[str, float]:
        """Clip the gradients, those of a detached MTP block by themselves. Return their norms before."""
        parts, norms = {"model": list(self.model.parameters())}, {}
        if self.model.config.detach_mtp:
            trunk = [p for name, p in self.model.named_parameters() if not name.startswith("mtp.")]
            parts = {"trunk": trunk, "mtp": list(self.model.mtp.parameters())}
        for name, parameters in parts.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            norms[name] = float(norm)
            if not math.isfinite(norms[name]):
                raise NonFiniteLossError(
                    f"{where or 'this step'}: the norm of the {name}'s gradients is {norms[name]} although the loss is "
                    f"finite; {self._weights_now()}"
                )
            # Each rank scales its own parts: `clip_grad_norm_` plans products of DTensors, half a second a mesh on CPU.
            parts_of_rank = [_part_of_rank(one) for one in gradients]
            if parts_of_rank:
                torch._foreach_mul_(parts_of_rank, (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norms

    def _report(
        self,
        totals: torch.Tensor,
        hits: torch.Tensor,
        counts: torch.Tensor,
        norms: dict[str, float],
        sizes: torch.Tensor,
    ) -> StepReport:
        config, depths = self.model.config, self.model.config.num_depths
        step_counts, (tokens, pairs) = counts.sum((0, 1)), map(int, sizes.tolist())
        means = shares(totals.sum((0, 1)).tolist(), step_counts.tolist())
        if self.config.normalisation == "token":
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
            tokens=tokens,
            flops=step_flops(config, tokens, pairs),
            right=hits.sum((0, 1)).tolist(),
            counted=step_counts[: 1 + depths].tolist(),
        )


def _part_of_rank(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_counts(
    model: GPT, microbatches: Sequence[Microbatch], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the valid tokens of a step by loss, [num_sums], over all microbatches and ranks of `group` (dp x cp)."""
    total = torch.stack([model.counts(batch, layout) for batch, layout in microbatches]).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients over the ranks of `group`, in place, for a model that is not sharded over them."""
    for parameter in parameters if group is not None else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
