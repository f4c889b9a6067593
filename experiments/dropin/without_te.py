"""What Megatron-LM's main branch needs where Transformer Engine is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch


def _norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    return kind(normalized_shape=hidden_size, eps=eps)


def _is_not(_: Any) -> bool:
    return False


@contextlib.contextmanager
def megatron_without_te() -> Iterator[None]:
    """Let Megatron-LM build models without Transformer Engine inside the block; does nothing if it is installed.

    torch's norms serve under sequence parallelism too, which Megatron-LM refuses. Their gradients are then those of
    this rank's tokens.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_token_prediction, torch_norm

    with contextlib.ExitStack() as stack:
        if not transformer_engine.HAVE_TE:
            stack.enter_context(mock.patch.object(torch_norm.WrappedTorchNorm, "__new__", _norm))
            if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
                # It asks whether a module is an instance of a class that is None.
                name = "is_inference_column_parallel_linear"
                stack.enter_context(mock.patch.object(multi_token_prediction, name, _is_not))
        yield


def partitioned_indices(
    cu_seqlens: torch.Tensor, total_tokens: int, cp_size: int, cp_rank: int
) -> torch.Tensor:
    """Return the tokens of a rank, as Transformer Engine's `thd_get_partitioned_indices`: each document in zigzag.

    Args:
        cu_seqlens: bounds of the documents, int32 [documents + 1].
        total_tokens: of all ranks.
        cp_size: how many ranks share the documents.
        cp_rank: this one.
    """
    bounds, parts = cu_seqlens.tolist(), []
    for begin, end in pairwise(bounds):
        chunk = (end - begin) // (2 * cp_size)
        for held in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(np.arange(begin + held * chunk, begin + (held + 1) * chunk))
    return torch.from_numpy(np.concatenate(parts)).to(cu_seqlens.device)


def partition_by_stand_in() -> None:
    """Give Megatron-LM that one function of Transformer Engine. What else needs the package still fails."""
    from megatron.core import utils

    utils.tex = SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
