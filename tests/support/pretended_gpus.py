"""The transport of activations between GPUs, on CPU ranks: kernels are interpreted, and gloo carries the messages.

There is one stream, on which everything runs at once. So this shows what is sent, written and kept, not its order.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from overlap_mtp.schedules import activations


class Stream:
    """The one stream: all of them are equal."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    __hash__ = object.__hash__

    def wait_event(self, event: Event) -> None:
        assert event.is_recorded

    def synchronize(self) -> None: ...


class Event:
    """At first, the device has not always reached it when it is asked, so that other buffers are needed."""

    is_recorded = False
    answers = itertools.chain((True, True, False) * 3, itertools.repeat(True))

    def record(self, stream: Stream) -> None:
        self.is_recorded = True

    def query(self) -> bool:
        return next(self.answers)

    def synchronize(self) -> None:
        assert self.is_recorded


@contextlib.contextmanager
def pretended_gpus() -> Iterator[None]:
    """Within it, rolls of activations of CPU ranks go by the transport of GPUs."""
    from overlap_mtp.exchange.row_cuda import NcclRowTransport  # here: without Triton there is none
    from overlap_mtp.kernels.launch import Launch

    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*args, **options)

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(activations, "GlooRowTransport", NcclRowTransport),
            mock.patch.object(torch, "zeros", unpinned),
            mock.patch.object(torch.Tensor, "record_stream"),
            mock.patch.multiple(Launch, capture=lambda self: None, replay=lambda self: self()),
            mock.patch.multiple(
                torch.cuda,
                Stream=Stream,
                Event=Event,
                current_stream=Stream,
                set_stream=lambda stream: None,
                stream=lambda stream: contextlib.nullcontext(),
                synchronize=lambda device: None,
                is_current_stream_capturing=lambda: False,
            ),
        ):
            stack.enter_context(patch)
        yield


def on_pretended_gpus(group: dist.ProcessGroup, body: Callable[..., Any], *args: Any) -> Any:
    """What a body of ranks returns within `pretended_gpus`."""
    with pretended_gpus():
        return body(group, *args)
