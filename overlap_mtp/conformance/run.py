"""Run a case on this rank, and compare what comes out with the reference."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.conformance.cases import Case
from overlap_mtp.conformance.outcome import SHOWN, Difference, Outcome, RankResult, Step, outcome_of
from overlap_mtp.conformance.targets import RolledAt, Start, Target
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.reference import roll_reference
from overlap_mtp.tensors import INTEGER_VIEW, sum_dtype


def check_target(
    target: Target,
    cases: Iterable[Case],
    cp_group: dist.ProcessGroup,
    device: torch.device | None = None,
    stop_at_first: bool = False,
) -> list[Outcome]:
    """Check a roll inside of ranks that run already. All ranks of the group call this.

    A roll that hangs hangs this, too, and after one that raises on some ranks the group is of no further use:
    `check_in_workers` survives both.

    Args:
        target: the roll, from `load_target` or `FunctionTarget`.
        cases: from `cases_for`, for as many ranks as the group has.
        cp_group: the ranks that share a sequence.
        device: of the tensors. Default: this rank's GPU for NCCL, otherwise the CPU.
        stop_at_first: end after the first case that is not right.

    Returns:
        The outcomes, the same on all ranks.
    """
    device = device or device_of(cp_group)
    outcomes = []
    for case in cases:
        began = time.monotonic()
        everyone: list[Any] = [None] * cp_group.size()
        dist.all_gather_object(everyone, run_case(target, case, cp_group, device), group=cp_group)
        outcomes.append(outcome_of(case.name, everyone))
        outcomes[-1].seconds = time.monotonic() - began
        if stop_at_first and not outcomes[-1].is_right:
            break
    return outcomes


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors of a group's rank belong."""
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


@dataclass
class Batch:
    """One batch of a case on this rank: what goes into the roll, what must come out, and what did."""

    layout: SequenceLayout
    full: torch.Tensor
    given: torch.Tensor
    at: RolledAt | None = None
    rolled: dict[int, torch.Tensor] = field(default_factory=dict)  # by depth, as they were returned


class CaseRun:
    """The comparisons of one case on one rank."""

    def __init__(self, case: Case, cp_rank: int, device: torch.device) -> None:
        self.case, self.cp_rank, self.device = case, cp_rank, device
        self.result = RankResult(cp_rank)
        self._input: torch.Tensor | None = None  # of the order "same input"

    def run(self, start: Start) -> None:
        """Roll all batches of the case. Raise whatever the roll raises."""
        depths = range(1, self.case.num_depths + 1)
        batches = []
        for number in range(len(self.case.layouts)):
            batch = self._batch(number)
            batch.at = start(batch.given, batch.layout, self.case.bounds)
            batches.append(batch)
            if self.case.order != "in flight":
                for depth in depths:
                    self._roll(number, batch, depth)
        if self.case.order == "in flight":
            for depth in depths:
                for number in reversed(range(len(batches))):
                    self._roll(number, batches[number], depth)
        for number, batch in enumerate(batches):  # later rolls must not have changed what was returned before
            for depth, rolled in batch.rolled.items():
                if (number, depth) not in self.result.differences:
                    self._compare((number, depth), batch, rolled, "it was right when it was returned")

    def _batch(self, number: int) -> Batch:
        layout, full = self.case.layouts[number], self.case.full_tensor(number)
        local = layout.shard(full, self.cp_rank).to(self.device)
        if self.case.order == "same input":
            self._input = local if self._input is None else self._input.copy_(local)
            local = self._input
        if not self.case.is_contiguous:
            wide = local.new_ones((*local.shape, 2))
            wide[..., 0] = local
            local = wide[..., 0]
        return Batch(layout, full, local)

    def _roll(self, number: int, batch: Batch, depth: int) -> None:
        assert batch.at is not None
        step = (number, depth)
        given = batch.rolled.get(depth - 1, batch.given)
        before = given.clone()
        rolled, total = batch.at(depth)
        if not same_bits(given, before):
            self._fault(step, f"the roll changed its input, the tensor at depth {depth - 1}")
        if not isinstance(rolled, torch.Tensor):
            raise TypeError(f"the roll must return a tensor, got a {type(rolled).__name__}")
        if not self._compare(step, batch, rolled):
            batch.rolled[depth] = rolled
            self._check_sum(step, rolled, total)

    def _compare(self, step: Step, batch: Batch, rolled: torch.Tensor, history: str = "") -> bool:
        """Return whether a rolled tensor is wrong, and note how."""
        local = batch.given
        for what in ("dtype", "shape", "device"):
            expected, actual = getattr(local, what), getattr(rolled, what)
            if actual != expected:
                self._fault(step, f"the {what} must be {_brief(expected)}, got {_brief(actual)}")
                return True
        full = roll_reference(batch.full, batch.layout, step[1])
        should = batch.layout.shard(full, self.cp_rank)
        actual = rolled.detach().cpu().contiguous()
        wrong = bits(should) != bits(actual)
        if not wrong.any():
            return False
        rows = wrong.view(-1, wrong.shape[-1])  # [B, L]
        order = torch.from_numpy(batch.layout.positions(self.cp_rank)).argsort()
        in_order = order[rows.any(0)[order]]  # local indices that are wrong, by position
        positions = batch.layout.positions(self.cp_rank)[in_order[:SHOWN].numpy()]
        at, row = int(in_order[0]), int(rows[:, in_order[0]].nonzero()[0])
        expected, actual = (one.reshape(rows.shape)[row, at].item() for one in (should, actual))
        self.result.differences[step] = Difference(
            cp_rank=self.cp_rank,
            row=row,
            position=int(positions[0]),
            expected=expected,
            actual=actual,
            positions=tuple(positions.tolist()),
            num_positions=len(in_order),
            num_wrong=int(wrong.sum()),
            num_tokens=wrong.numel(),
        )
        if history:
            self._fault(step, history)
        return True

    def _check_sum(self, step: Step, rolled: torch.Tensor, total: Any) -> None:
        """Note a sum that is not the rolled tensor's, as summed in its own dtype or in a wider one."""
        if total is None:
            return
        total = torch.as_tensor(total)
        wide, slack = rolled.sum(dtype=sum_dtype(rolled.dtype)).double().item(), 0.0
        if rolled.dtype.is_floating_point:
            most = rolled.double().abs().sum().item()
            slack = 8 * torch.finfo(rolled.dtype).eps * most
            if total.is_floating_point() and not most < torch.finfo(total.dtype).max:
                return  # it may overflow
        actual, narrow = (one.double().sum().item() for one in (total, rolled.sum(dtype=rolled.dtype)))
        if total.numel() != 1 or not (actual == narrow or abs(actual - wide) <= slack):
            self._fault(step, f"the sum must be {wide:g}, got {actual:g}")

    def _fault(self, step: Step, text: str) -> None:
        self.result.faults.setdefault(step, text)


def run_case(target: Target, case: Case, cp_group: dist.ProcessGroup, device: torch.device) -> RankResult:
    """Run a case on this rank.

    Args:
        target: the roll.
        case: made for as many ranks as the group has.
        cp_group: the ranks that share a sequence.
        device: of the tensors.

    Returns:
        What this rank saw. An exception of the roll is part of that.
    """
    run = CaseRun(case, cp_group.rank(), device)
    most = max(layout.num_documents for layout in case.layouts)
    try:
        with target.open(cp_group, case.num_depths, most) as start:
            run.run(start)
    except Exception as error:
        text = str(error).strip() or "no message"
        return RankResult(run.cp_rank, error=f"{type(error).__name__}: {text.splitlines()[0][:200]}")
    return run.result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, so that -0.0 is not 0.0, and NaN is itself."""
    return tensor.contiguous().view(INTEGER_VIEW[tensor.dtype])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal to the bit."""
    return torch.equal(bits(one), bits(other))


def _brief(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
