"""The transports of activations between GPUs, on CPU ranks: kernels are interpreted.

gloo carries the messages in place of NCCL. Symmetric memory is memory that ranks map from files. There is one stream,
on which everything runs at once. So this shows what is sent, written and kept, not its order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from overlap_mtp.exchange import gloo, select
from overlap_mtp.exchange.group import ExchangeGroup
from overlap_mtp.exchange.row_transport import RowTransport
from overlap_mtp.exchange.rows import RowPlan
from overlap_mtp.exchange.transport import Transport, TransportConfig


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


class SharedFiles:
    """In place of torch's symmetric memory: each rank maps the files of all."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}  # by address

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        file, path = tempfile.mkstemp()
        os.truncate(file, size * dtype.itemsize)
        os.close(file)
        memory = torch.from_file(path, shared=True, size=size, dtype=dtype)
        self._paths[memory.data_ptr()] = path
        return memory

    def rendezvous(self, memory: torch.Tensor, group: dist.ProcessGroup) -> Any:
        path = self._paths[memory.data_ptr()]
        paths = [path] * group.size()
        dist.all_gather_object(paths, path, group)
        mapped = [
            memory if one == path else torch.from_file(one, shared=True, size=len(memory), dtype=memory.dtype)
            for one in paths
        ]
        dist.barrier(group)
        os.remove(path)
        return mock.Mock(mapped=mapped, buffer_ptrs=[one.data_ptr() for one in mapped], offset=0)


@contextlib.contextmanager
def pretended_gpus(is_symmetric: bool = False) -> Iterator[None]:
    """Within it, exchanges of CPU ranks go by a transport of GPUs."""
    from overlap_mtp.exchange import symmetric  # here: without Triton there is none
    from overlap_mtp.kernels.launch import Launch

    def asked(config: TransportConfig) -> TransportConfig:
        return replace(
            config, spec=config.spec._replace(transport="auto" if is_symmetric else "process_group")
        )

    def make(config: TransportConfig) -> Transport:
        made = select.between_gpus(asked(config))
        assert (made.name == "symmetric") == (is_symmetric and config.group.cp_size > 1)
        return made

    def make_of_rows(
        config: TransportConfig, plans: list[RowPlan], tp_group: ExchangeGroup | None
    ) -> RowTransport:
        made = select.rows_between_gpus(asked(config), plans, tp_group)
        is_for_it = config.spec.schedule == "overlap" and config.group.cp_size > 1 and tp_group is None
        assert (made.name == "symmetric") == (is_symmetric and is_for_it)
        return made

    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*args, **options)

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(gloo, "GlooTransport", make),
            mock.patch.object(select, "GlooRowTransport", make_of_rows),
            mock.patch.object(symmetric, "symmetric_memory", SharedFiles()),
            mock.patch.object(torch, "zeros", unpinned),
            mock.patch.object(torch.Tensor, "record_stream"),
            mock.patch.multiple(
                Launch, capture=lambda self, grid=None: None, replay=lambda self, grid=None: self(grid)
            ),
            mock.patch.multiple(
                torch.cuda,
                Stream=Stream,
                Event=Event,
                current_stream=Stream,
                set_stream=lambda stream: None,
                stream=lambda stream: contextlib.nullcontext(),
                synchronize=lambda device=None: None,
                is_current_stream_capturing=lambda: False,
            ),
        ):
            stack.enter_context(patch)
        yield


def on_pretended_gpus(
    group: dist.ProcessGroup, is_symmetric: bool | None, body: Callable[..., Any], *args: Any
) -> Any:
    """What a body of ranks returns within `pretended_gpus`, or on CPU ranks as they are (None)."""
    with contextlib.nullcontext() if is_symmetric is None else pretended_gpus(is_symmetric):
        return body(group, *args)
