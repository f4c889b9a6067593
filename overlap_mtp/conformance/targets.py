"""What can be checked: Megatron-LM's roll, the rollers of this package, and any function with Megatron's signature."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp.conformance.cases import Bounds
from overlap_mtp.device_layout import Layout, layout_from
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules import SCHEDULES, make_roller

MEGATRON = "megatron"
OURS = "overlap_mtp"
MEGATRON_FUNCTION = "megatron.core.transformer.multi_token_prediction:roll_tensor"

# By depth: the rolled tensor, and its sum if the roll returns one.
RolledAt = Callable[[int], tuple[Any, Any]]
Start = Callable[[torch.Tensor, SequenceLayout, Bounds], RolledAt]


@dataclass
class PackedSeqParams:
    """The documents of a batch, in the fields of Megatron-LM's class of this name."""

    qkv_format: str | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_kv: torch.Tensor | None = None
    cu_seqlens_q_padded: torch.Tensor | None = None
    cu_seqlens_kv_padded: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None
    local_cp_size: int | None = None
    cp_group: dist.ProcessGroup | None = None


def packed_seq_params(
    layout: SequenceLayout,
    bounds: Bounds,
    device: torch.device,
    of_class: Callable[..., Any] = PackedSeqParams,
) -> Any:
    """Tell of a layout's documents as Megatron-LM does.

    Args:
        layout: of the batch.
        bounds: which of the fields hold what; "none" for a dense layout.
        device: where cu_seqlens belong.
        of_class: what to make.

    Returns:
        An object of that class, or None for "none".
    """
    if bounds == "none":
        return None
    documents = layout.num_documents - bool(layout.tail_len)  # a tail lies after the last bound
    padded = torch.from_numpy(layout.cu_seqlens[: documents + 1]).to(device, torch.int32)
    valid = torch.zeros_like(padded)
    valid[1:] = torch.from_numpy(layout.valid_lengths[:documents]).cumsum(0)
    cu_seqlens = valid if bounds == "padded" else padded
    cu_seqlens_padded = None if bounds == "unpadded" else padded
    longest = int((layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]).max())
    return of_class(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class Target(ABC):
    """A roll to check, under the name that the user gave it."""

    name: str

    @abstractmethod
    def open(
        self, cp_group: dist.ProcessGroup, num_depths: int, max_documents: int
    ) -> AbstractContextManager[Start]:
        """Make what rolls the batches of one case.

        Args:
            cp_group: the ranks that share a sequence.
            num_depths: the deepest roll that is asked for.
            max_documents: the most documents of a batch.

        Returns:
            A context manager. It gives a function that starts the rolls of a tensor. Its arguments are the tensor, its
            layout, and how packed_seq_params describes the documents. It returns a function that gives the rolled
            tensor of a depth. Depths are asked for one after the other.
        """


class FunctionTarget(Target):
    """A function with Megatron's signature: depth k is k calls, each with what the one before returned.

    It may leave out `return_sum`, the sum, and, if it rolls dense tensors only, `packed_seq_params`. If it has a
    parameter `layout`, it gets the SequenceLayout, too: nothing in Megatron's signature tells a contiguous layout from
    a zigzag one.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], of_class: Callable[..., Any] = PackedSeqParams
    ) -> None:
        self.name, self._function, self._of_class = name, function, of_class
        self._parameters = inspect.signature(function).parameters

    @contextmanager
    def open(self, cp_group: dist.ProcessGroup, num_depths: int, max_documents: int) -> Iterator[Start]:
        def start(tensor: torch.Tensor, layout: SequenceLayout, bounds: Bounds) -> RolledAt:
            params = packed_seq_params(layout, bounds, tensor.device, self._of_class)
            arguments = {"shifts": -1, "dims": -1, "cp_group": cp_group}
            if params is not None:
                arguments["packed_seq_params"] = params
            optional = {"packed_seq_params": params, "return_sum": True, "layout": layout}
            arguments |= {name: value for name, value in optional.items() if name in self._parameters}
            last = tensor

            def at(_depth: int) -> tuple[Any, Any]:
                nonlocal last
                returned = self._function(last, **arguments)
                rolled, total = returned if isinstance(returned, tuple) else (returned, None)
                last = rolled
                return rolled, total

            return at

        yield start


class RollerTarget(Target):
    """A schedule of this package. On GPUs it gets the bounds of documents where they are."""

    def __init__(self, name: str, schedule: str) -> None:
        self.name, self._schedule = name, schedule

    @contextmanager
    def open(self, cp_group: dist.ProcessGroup, num_depths: int, max_documents: int) -> Iterator[Start]:
        most = max_documents + 1  # bounds on a GPU may have a tail after them
        roller = make_roller(self._schedule, cp_group, num_depths, max_documents=most)

        def start(tensor: torch.Tensor, layout: SequenceLayout, bounds: Bounds) -> RolledAt:
            params = packed_seq_params(layout, bounds, tensor.device)
            told: Layout = layout
            if params is not None and tensor.is_cuda:
                told = layout_from(params, layout.local_len, layout.cp_size, layout.kind)
            rolls = roller.start({"tokens": tensor}, told)
            return lambda depth: (rolls.at(depth)["tokens"], None)

        try:
            yield start
        finally:
            roller.close()


def load_target(name: str, schedule: str = "prefetch", device: str | None = None) -> Target:
    """Find the roll to check.

    Args:
        name: "megatron", "overlap_mtp", or "module:function".
        schedule: of overlap_mtp. "prepared" takes other tensors than a roll and cannot be checked.
        device: of the ranks, "cpu" or "cuda". Default: "cuda" if there is a GPU.

    Returns:
        The target. For "megatron" on the CPU, this process's torch.cuda.current_device is replaced.

    Raises:
        ValueError: if there is no such target or schedule, or its module cannot be imported.
    """
    if name == OURS:
        if schedule not in SCHEDULES or schedule == "prepared":
            known = ", ".join(one for one in SCHEDULES if one != "prepared")
            raise ValueError(f"schedule must be one of {known}, got {schedule!r}")
        return RollerTarget(name, schedule)
    path = MEGATRON_FUNCTION if name == MEGATRON else name
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"TARGET must be {MEGATRON}, {OURS} or module:function, got {name!r}")
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise ValueError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{path} must be a function, got a {type(function).__name__}")
    if name != MEGATRON:
        return FunctionTarget(name, function)
    if device == "cpu" or not torch.cuda.is_available():
        # Its dense roll receives into tensors on the current GPU. These belong on the CPU, as the tensor does.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    from megatron.core.packed_seq_params import PackedSeqParams as MegatronParams

    return FunctionTarget(name, function, MegatronParams)
