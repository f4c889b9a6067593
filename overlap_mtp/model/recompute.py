"""Activations that the backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")


def recomputed(function: Callable[P, R], wanted: bool) -> Callable[P, R]:
    """The function, of whose insides nothing is kept for backward if that is `wanted`."""
    if not (wanted and torch.is_grad_enabled()):
        return function
    # Nothing here draws random numbers: there is no state to put back.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
