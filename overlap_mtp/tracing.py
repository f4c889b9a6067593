"""NVTX ranges in the domain `overlap_mtp`, for Nsight Systems and (as record_function) for torch.profiler.

The ranges, all of them: `step <schedule>`, `trunk`, `depth <k>`, `loss`, `backward` of a training step, and of the
exchange `pack`, `send-recv`, `join` and `unroll`. A label is the name, its detail and the rank, as in
"step prefetch r0" or "send-recv r1"; the payload is rank << 48 | depth << 40 | bytes. LABEL reads a label back.
A range costs 0.3 µs when no tool listens; OVERLAP_MTP_TRACING=0 in the environment switches all of them off.
"""

from __future__ import annotations

import os
import re
from functools import cache
from types import TracebackType
from typing import Any

import nvtx
import torch
import torch.distributed as dist

NAMES = ("step", "trunk", "depth", "loss", "backward", "pack", "send-recv", "join", "unroll")
LABEL = re.compile(rf"^(?P<name>{'|'.join(NAMES)})(?: (?P<detail>\S+))? r(?P<rank>\d+)$")
DOMAIN = "overlap_mtp"
ENABLED = os.environ.get("OVERLAP_MTP_TRACING", "1") != "0"

_DOMAIN = nvtx.get_domain(DOMAIN)


class Span:
    """A range that can be entered any number of times, nested too: `with span("pack"): ...`."""

    def __init__(self, label: str, payload: int) -> None:
        self.label = label
        self._attributes = _DOMAIN.get_event_attributes(message=label, payload=payload)
        self._annotations: list[Any] = []  # of torch.profiler, while one is running

    def __enter__(self) -> None:
        if not ENABLED:
            return
        _DOMAIN.push_range(self._attributes)
        if torch._C._autograd._profiler_enabled():
            annotation: Any = torch.profiler.record_function(self.label)
            self._annotations.append(annotation.__enter__())

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        value: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if not ENABLED:
            return
        if self._annotations:
            self._annotations.pop().__exit__(None, None, None)
        _DOMAIN.pop_range()


@cache
def span(name: str, detail: str | int = "", depth: int = 0, num_bytes: int = 0) -> Span:
    """The range of that name. Call it when torch.distributed is up, where it ever is: the rank is read once."""
    assert name in NAMES
    rank = dist.get_rank() if dist.is_initialized() else 0
    label = f"{name} {detail} r{rank}" if detail != "" else f"{name} r{rank}"
    return Span(label, rank << 48 | depth << 40 | num_bytes)


class BackwardSpan:
    """Marks the backward pass between two tensors, on the thread that runs it.

    x = marks.ends(x)        # where the forward begins
    loss = marks.begins(f(x))  # where it ends
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
    """The identity; calls `when` where its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, when: Any) -> torch.Tensor:
        ctx.when = when
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.when()
        return gradient, None
