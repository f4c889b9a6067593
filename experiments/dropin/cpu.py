"""Lets Megatron-LM run on CPU ranks over gloo: in this process, "cuda" means "cpu". For tests and trials only.

Megatron-LM makes its tensors on the current GPU and its groups over NCCL. Nothing here belongs near a real training.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import typing_extensions
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _on_cpu(value: Any) -> Any:
    """Return the CPU for a GPU, and any other value as it is."""
    return CPU if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


class CudaMeansCpu(TorchFunctionMode):
    """Replaces the devices that torch's functions get."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            device = kwargs["device"]
            kwargs["device"] = CPU if isinstance(device, int) else _on_cpu(device)
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        if func is torch.Tensor.to:
            args = tuple(map(_on_cpu, args))
        return func(*args, **kwargs)


class SharedGroups:
    """Makes one gloo group for each set of ranks: each costs four threads, and Megatron-LM makes 30 at a time."""

    def __init__(self) -> None:
        self._make, self._destroy = dist.new_group, dist.destroy_process_group
        self._made: dict[tuple[int, ...] | None, dist.ProcessGroup] = {}

    def new_group(self, ranks: list[int] | None = None, *_: Any, **options: Any) -> dist.ProcessGroup:
        """Return the group of these ranks."""
        key = None if ranks is None else tuple(ranks)
        if key not in self._made:
            self._made[key] = self._make(ranks, timeout=options.get("timeout"), backend="gloo")
        return self._made[key]

    def destroy_process_group(self, group: dist.ProcessGroup | None = None) -> None:
        """Destroy a group if nobody shares it, or all groups."""
        if group is None:
            self._made.clear()
        if group not in self._made.values():
            self._destroy(group)


def _start_on_gloo(start: Callable[..., None]) -> Callable[..., None]:
    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        options.pop("device_id", None)
        start("gloo" if backend == "nccl" else backend, *arguments, **options)

    return init_process_group


def _module_to(move: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return move(self, *map(_on_cpu, args), **{name: _on_cpu(one) for name, one in kwargs.items()})

    return to


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Let Megatron-LM run on the CPU inside the block. Enter it before Megatron-LM's models are imported.

    Process groups of the same ranks become one. torch knows 8 GPUs in the block, and they are the CPU. There is one
    random generator, so dropout differs from that on GPUs.
    """
    if not hasattr(typing, "override"):  # Megatron-LM's main branch wants Python 3.12
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    from megatron.core.tensor_parallel import random

    groups, cuda = SharedGroups(), torch.cuda
    replaced: list[tuple[Any, str, Any]] = [
        (cuda, "device_count", lambda: 8),
        (cuda, "set_device", _nothing),
        (cuda, "current_device", lambda: CPU),
        (cuda, "synchronize", _nothing),
        (cuda, "get_rng_state", _get_state),
        (cuda, "set_rng_state", _set_state),
        (cuda.random, "get_rng_state", _get_state),
        (cuda.random, "set_rng_state", _set_state),
        (cuda, "manual_seed", torch.manual_seed),
        (cuda, "initial_seed", torch.initial_seed),
        (cuda, "max_memory_allocated", lambda *_: 0),
        (torch.nn.Module, "cuda", lambda self, *_: self),
        (torch.nn.Module, "to", _module_to(torch.nn.Module.to)),
        (random, "_get_cuda_rng_state", _get_state),
        (random, "_set_cuda_rng_state", _set_state),
        (dist, "init_process_group", _start_on_gloo(dist.init_process_group)),
        (dist, "new_group", groups.new_group),
        (dist, "destroy_process_group", groups.destroy_process_group),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(CudaMeansCpu())
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
