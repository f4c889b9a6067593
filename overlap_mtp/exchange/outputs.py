"""Memory for the rolls of a microbatch. It is never used again: it belongs to the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from overlap_mtp.exchange.spec import ExchangeSpec, column_addresses

# One allocation holds the rolls of 8 microbatches, or of fewer if 8 take more than MAX_BYTES.
MICROBATCHES = 8
MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class Outputs:
    """The rolls of one microbatch, to be written."""

    depths: list[dict[str, torch.Tensor]]  # [num_depths], each tensor of the batch's shape
    # Of all columns of depth 1 in the order of the names, then of depth 2, ...; 0 for none.
    addresses: list[int]


def allocate_outputs(
    spec: ExchangeSpec, tensors: list[torch.Tensor], num_depths: int, microbatches: int = 1
) -> list[Outputs]:
    """Allocate the rolls of some microbatches.

    Args:
        spec: of the batch.
        tensors: of the batch, in the order of the spec's names.
        num_depths: how many depths an exchange carries.
        microbatches: how many.

    Returns:
        The outputs of each microbatch.
    """
    parts = spec.parts
    own_depths = [min(depths, num_depths) for depths in spec.depths]
    with torch.inference_mode(False):
        # Parts of an unsafe split have versions of their own: a write to one must not count as a write to others.
        memory = [
            tensor.new_empty((microbatches * own * len(tensor), *tensor.shape[1:]))
            for tensor, own in zip(tensors, own_depths, strict=True)
        ]
        rolls = [
            iter(all_rolls.unsafe_split(len(tensor)))
            for all_rolls, tensor in zip(memory, tensors, strict=True)
        ]
    made = []
    for _ in range(microbatches):
        depths = [
            {name: next(rolls[n]) for n, name in enumerate(spec.names) if depth < own_depths[n]}
            for depth in range(num_depths)
        ]
        addresses = []
        for rolled in depths:
            addresses += column_addresses([rolled.get(name) for name in spec.names], parts)
        made.append(Outputs(depths, addresses))
    return made


class OutputPool:
    """Outputs that are allocated for several microbatches at a time.

    That saves 100 to 150 µs of host time a microbatch (prefetch, 2 x H100, h2048 and h4096): allocations and views of
    eight small tensors cost more than all else in an exchange.
    """

    def __init__(self, spec: ExchangeSpec, num_depths: int) -> None:
        self._spec, self._num_depths = spec, num_depths
        self._ready: list[Outputs] = []
        self._ready_for: Any = None

    def take(self, tensors: list[torch.Tensor], stream: torch.cuda.Stream) -> tuple[Outputs, bool]:
        """Take the outputs of one microbatch. Their memory belongs to `stream`, which must be the current one.

        Returns:
            The outputs; and whether their memory was allocated just now, for these and others that follow.
        """
        key = (tensors[0].shape[-1], stream)
        is_new = not self._ready or self._ready_for != key
        if is_new:
            size = self._num_depths * sum(tensor.nbytes for tensor in tensors)
            microbatches = min(MICROBATCHES, max(1, MAX_BYTES // size))
            self._ready = allocate_outputs(self._spec, tensors, self._num_depths, microbatches)
            self._ready_for = key
        return self._ready.pop(), is_new

    def clear(self) -> None:
        self._ready.clear()
