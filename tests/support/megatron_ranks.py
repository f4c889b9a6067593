"""Runs bodies with Megatron-LM on the ranks of a pool. This imports no Megatron-LM: the tests' own process has no need.

`MEGATRON_CHECKOUT`, a folder of Megatron-LM, makes the tests use it in place of the installed megatron-core.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import typing
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import typing_extensions

CHECKOUT = os.environ.get("MEGATRON_CHECKOUT", "")
TOKENS, VOCAB, DEPTHS = 16, 32, 2  # tokens of a rank; MTP layers

_kept = contextlib.ExitStack()  # the shims, until the rank ends


def use_checkout() -> None:
    """Let `import megatron` find the checkout, if there is one."""
    if CHECKOUT and CHECKOUT not in sys.path:
        sys.path.insert(0, CHECKOUT)
    if not hasattr(typing, "override"):  # Megatron-LM's main branch wants Python 3.12
        typing.override = typing_extensions.override  # type: ignore[attr-defined]


def has_megatron() -> bool:
    """Whether megatron-core can be imported. It is not imported: that takes 6 s."""
    use_checkout()
    spec = find_spec("megatron")
    return spec is not None and find_spec("megatron.core") is not None


needs_megatron = pytest.mark.skipif(not has_megatron(), reason="megatron-core is not installed")
UNINSTALLS = [  # marks of test modules that install the drop-in
    pytest.mark.filterwarnings("ignore"),  # Megatron-LM's, of what is not installed
    pytest.mark.usefixtures("uninstalled"),
]


def is_main() -> bool:
    """Whether the checkout is of Megatron-LM's main branch, which rolls more than megatron-core 0.16.1."""
    path = os.path.join(CHECKOUT, "megatron", "core", "models", "hybrid", "hybrid_model.py")
    return bool(CHECKOUT) and os.path.exists(path)


@dataclass(frozen=True)
class Model:
    """A small model of Megatron-LM and how ranks share it."""

    cp: int = 4
    tp: int = 1
    pp: int = 1
    vp: int | None = None  # model chunks of each pipeline stage
    sequence_parallel: bool = False
    num_layers: int = 2
    wrapper: str = ""  # "float16" or "ddp"
    hybrid: bool = False
    options: tuple[tuple[str, Any], ...] = ()  # of TransformerConfig


@dataclass(frozen=True)
class Case:
    """Steps of a model, and the batches that it gets."""

    model: Model = Model()
    documents: int = 0
    rows: int = 1
    tokens: int = TOKENS  # of a rank
    microbatches: int = 2
    positional: bool = False  # arguments up to packed_seq_params
    has_loss_mask: bool = True
    mask_dtype: torch.dtype = torch.float32
    has_padding_mask: bool = False
    has_labels: bool = True
    is_views: bool = False  # ids, labels and mask are no contiguous tensors
    is_eval: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of install


@dataclass
class Outcome:
    """What a rank found."""

    wrong: list[str]  # which results differ from Megatron-LM's own
    gradients: int  # how many there are
    forwards: int
    exchanges: int
    answered: int
    fallbacks: Counter[str]
    own_rolls: int  # torch.roll calls while the drop-in was installed: all of them are Megatron-LM's
    extra: Any = None


@functools.cache
def _prepare() -> None:
    """Let Megatron-LM run in this process, on the CPU."""
    warnings.simplefilter("ignore")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    use_checkout()
    from dropin.cpu import megatron_on_cpu
    from dropin.without_te import megatron_without_te

    _kept.enter_context(megatron_on_cpu())
    _kept.enter_context(megatron_without_te())
    # Main's DistributedDataParallel waits for the current stream.
    _kept.enter_context(mock.patch.object(torch.cuda, "current_stream", mock.MagicMock()))


def on_megatron(_group: dist.ProcessGroup, module: str, body: str, *arguments: Any) -> Any:
    """Call a function of a module that imports Megatron-LM, on a rank."""
    _prepare()
    return getattr(importlib.import_module(module), body)(*arguments)
