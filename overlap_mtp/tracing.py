"""NVTX ranges in the domain `overlap_mtp`, for Nsight Systems and (as record_function) for torch.profiler.

These are all: `step <schedule>`, `trunk`, `depth <k>`, `loss` and `backward` of a training step; `pack`, `send-recv`,
`join` and `unroll` of an exchange. `overlap_mtp.labels` says what they are called. The payload is rank << 48 |
depth << 40 | bytes. A range costs 0.3 µs if no tool listens. OVERLAP_MTP_TRACING=0 in the environment switches all of
them off.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import nvtx
import torch
import torch.distributed as dist

from overlap_mtp.labels import DOMAIN, NAMES

ENABLED = os.environ.get("OVERLAP_MTP_TRACING", "1") != "0"

_DOMAIN = nvtx.get_domain(DOMAIN)


class Span:
    """A range that can be entered any number of times, also nested: `with span("pack"): ...`."""

    def __init__(self, label: str, payload: int) -> None:
        self.label = label
        self._attributes = _DOMAIN.get_event_attributes(message=label, payload=payload)
        self._annotations: list[Any] = []  # of torch.profiler, while one is running

    def __enter__(self) -> None:
        if not ENABLED:
            return
        _DOMAIN.push_range(self._attributes)
        # Private, but a record_function that nobody reads takes over 10 µs, and an exchange has four ranges.
        if torch._C._autograd._profiler_enabled():
            annotation: Any = torch.profiler.record_function(self.label)
            self._annotations.append(annotation.__enter__())

    def __exit__(self, *_: object) -> None:
        if not ENABLED:
            return
        if self._annotations:
            self._annotations.pop().__exit__(None, None, None)
        _DOMAIN.pop_range()


@cache
def span(name: str, detail: str | int = "", depth: int = 0, num_bytes: int = 0) -> Span:
    """Return the range of a name. Call it after torch.distributed is initialised: the rank is read once.

    Args:
        name: one of NAMES.
        detail: a word after the name.
        depth: for the payload.
        num_bytes: for the payload.

    Returns:
        The range. The same arguments give the same one.
    """
    assert name in NAMES
    rank = dist.get_rank() if dist.is_initialized() else 0
    label = f"{name} {detail} r{rank}" if detail != "" else f"{name} r{rank}"
    return Span(label, rank << 48 | depth << 40 | num_bytes)


class BackwardSpan:
    """Marks the backward pass between two tensors, on the thread that runs it.

    x = marks.ends(x)          # at the beginning of the forward pass
    loss = marks.begins(f(x))  # at its end
    """

    def __init__(self) -> None:
        self._is_open = False

    def begins(self, outputs: torch.Tensor) -> torch.Tensor:
        return _Mark.apply(outputs, self._open) if ENABLED else outputs  # type: ignore[no-untyped-call]

    def ends(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Mark.apply(inputs, self._close) if ENABLED else inputs  # type: ignore[no-untyped-call]

    def _open(self) -> None:
        self._is_open = True
        span("backward").__enter__()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            span("backward").__exit__()


class _Mark(torch.autograd.Function):
    """The identity. It calls `when` in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, when: Any) -> torch.Tensor:
        ctx.when = when
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.when()
        return gradient, None
