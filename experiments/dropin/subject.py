"""What all parts of a benchmark work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from dropin.batches import Batch
from dropin.model import MegatronModel
from dropin.sizes import Problem
from dropin.switch import Switch


@dataclass(frozen=True)
class Subject:
    """A model on this rank, who rolls for it, and where to print."""

    problem: Problem
    model: MegatronModel
    switch: Switch
    device: torch.device
    console: Console  # prints on rank 0 only

    def batch(self, documents: int, seed: int) -> Batch:
        """Return the batch of a seed, on this rank's device; 0 documents: a dense one."""
        return Batch(self.problem, documents, seed, self.device)
