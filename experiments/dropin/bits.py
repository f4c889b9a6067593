"""Compare the losses, MTP losses and gradients of a step under all modes, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dropin.batches import Batch
from dropin.modes import AGAIN, BASELINE, REFERENCE, has_host_bounds, is_equal
from dropin.subject import Subject
from harness.rounds import gather, synchronize


@dataclass(frozen=True)
class StepResult:
    """What one step gave, on this rank."""

    loss: torch.Tensor
    mtp_losses: torch.Tensor  # [depths]
    gradients: dict[str, torch.Tensor]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch use deterministic algorithms. With `warn_only`, flash attention's backward would not be."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def one_step(subject: Subject, mode: str, batch: Batch) -> StepResult:
    """Run forward and backward in a mode and return its results."""
    model = subject.model
    subject.switch.to(mode)
    model.load(batch)
    loss = model.loss(batch, batch.packed_seq_params(has_host_bounds(mode)))
    loss.backward()  # type: ignore[no-untyped-call]
    synchronize(batch.device)
    return StepResult(loss.detach().clone(), model.mtp_losses(), model.gradients())


def compare_bits(subject: Subject, modes: list[str], batch: Batch) -> dict[str, dict[str, Any]] | None:
    """Compare the steps of all modes with Megatron-LM's own, bit for bit. Collective.

    Returns:
        On rank 0, for each mode and for Megatron-LM's own step once more: whether `loss` and `mtp_losses` are the same
        on all ranks, `equal_gradients` of `gradients` of the worst rank, and the `largest_difference` of a gradient.
        None on the other ranks.
    """
    with deterministic():
        expected = one_step(subject, REFERENCE, batch)
        mine = {}
        for name in [*(mode for mode in modes if mode != REFERENCE), AGAIN]:
            mode = REFERENCE if name == AGAIN else name
            mine[name] = _compare(one_step(subject, mode, batch), expected)
    subject.model.gpt.zero_grad(set_to_none=True)
    everyone = gather(mine)
    if everyone is None:
        return None
    worst: dict[str, Callable[..., Any]] = {
        "loss": all,
        "mtp_losses": all,
        "equal_gradients": min,
        "gradients": max,
        "largest_difference": max,
    }
    return {
        name: {what: pick([rank[name][what] for rank in everyone]) for what, pick in worst.items()}
        for name in mine
    }


def _compare(found: StepResult, expected: StepResult) -> dict[str, Any]:
    names = found.gradients.keys() | expected.gradients.keys()
    both = found.gradients.keys() & expected.gradients.keys()
    pairs = [(found.gradients[name], expected.gradients[name]) for name in both]
    differences = [float((a.float() - b.float()).abs().max()) for a, b in pairs if not torch.equal(a, b)]
    return {
        "loss": torch.equal(found.loss, expected.loss),
        "mtp_losses": torch.equal(found.mtp_losses, expected.mtp_losses),
        "equal_gradients": len(both) - len(differences),
        "gradients": len(names),
        "largest_difference": max(differences, default=0.0),
    }


def as_expected(bits: dict[str, dict[str, Any]]) -> bool:
    """Return whether all modes give Megatron-LM's bits, but for `none`, whose MTP losses must differ."""
    return all(not row["mtp_losses"] if name == BASELINE else is_equal(row) for name, row in bits.items())
