"""Megatron-LM's `roll_tensor`, answered from a prefetch where one knows the tensor."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from overlap_mtp.megatron.prefetch import MARK, Mark, mark_of
from overlap_mtp.megatron.settings import status
from overlap_mtp.schedules.sync import roll_tensor as overlap_mtp_roll

Answer = tuple[torch.Tensor | None, torch.Tensor | None]
SUMMED = ("loss_mask",)  # the number of tokens; Megatron-LM drops the sums of all other tensors
UNKNOWN = "a tensor that no forward has announced"
NOT_OF_FORWARD = "a tensor that its forward does not know"

# Of each forward that is running: it sends its exchange, unless it has, and says why there is none, or "".
_running: list[Callable[[], str]] = []


def patched_roll(original: Callable[..., Answer]) -> Callable[..., Answer]:
    """Wrap Megatron-LM's `roll_tensor`.

    The sum of a tensor that is not a loss mask is None if it was answered from an exchange: nobody uses it.
    """
    sum_is_optional = "return_sum" in inspect.signature(original).parameters

    @functools.wraps(original)
    def roll_tensor(
        tensor: torch.Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
        return_sum: bool = True,
    ) -> Answer:
        if tensor is None:
            return None, None
        settings = status().settings
        if settings is not None:
            answer, reason = _answer(tensor, shifts, dims, cp_group, packed_seq_params)
            if answer is not None:
                status().answered += 1
                mark: Mark = getattr(answer, MARK)
                return answer, answer.sum() if return_sum and mark.name in SUMMED else None
            status().fallbacks[reason] += 1
            exact = (settings.unknown, settings.padding, settings.layout) == ("exact", "exact", "zigzag")
            if (
                exact
                and reason in (UNKNOWN, NOT_OF_FORWARD)
                and shifts == -1
                and dims in (-1, tensor.ndim - 1)
            ):
                with contextlib.suppress(ValueError):  # documents that we cannot roll
                    rolled, _ = overlap_mtp_roll(tensor, -1, -1, cp_group, packed_seq_params, False)
                    assert rolled is not None
                    return rolled, rolled.sum() if return_sum else None
        options = {"return_sum": return_sum} if sum_is_optional else {}
        return original(tensor, shifts, dims, cp_group, packed_seq_params, **options)

    return roll_tensor


def _answer(
    tensor: torch.Tensor, shifts: int, dims: int, cp_group: Any, packed: Any
) -> tuple[torch.Tensor | None, str]:
    """(the rolled tensor, "") or (None, why there is none)."""
    mark: Mark | None = getattr(tensor, MARK, None)
    reason = UNKNOWN
    if mark is None and _running:
        reason = _running[-1]() or NOT_OF_FORWARD
        mark = getattr(tensor, MARK, None)
    if mark is None:
        return None, "a tensor that needs a gradient" if tensor.requires_grad else reason
    if mark.prefetch.reason:
        return None, mark.prefetch.reason
    if mark_of(tensor) is None or mark.prefetch.was_written(mark.name):
        return None, "a tensor that was written to after its exchange was sent"
    if shifts != -1 or dims not in (-1, tensor.ndim - 1):
        return None, "another shift or dimension"
    if cp_group is not mark.prefetch.cp_group or packed is not mark.prefetch.packed:
        return None, "another cp_group or packed_seq_params than the model's"
    answer = mark.prefetch.answer(mark)
    return answer, "" if answer is not None else mark.prefetch.reason or "more depths than the model has"


@contextlib.contextmanager
def running(send: Callable[[], str]) -> Iterator[None]:
    """A forward runs within this. `send` sends its exchange at the first call, and returns why there is none, or ""."""
    _running.append(send)
    try:
        yield
    finally:
        _running.pop()
