"""What is rolled, and whether the rolls are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, prepare, roll_reference
from overlap_mtp.exchange.spec import fills_of
from overlap_mtp.schedules.roller import Rolls

TENSORS = ("input_ids", "labels", "position_ids", "loss_mask")


@dataclass(frozen=True)
class Workload:
    """What is rolled: four tensors of batch size 1. No documents are a dense sequence."""

    cp_size: int
    depths: int
    documents: int  # 0: dense
    tokens: int  # of a rank


def new_layout(workload: Workload, seed: int) -> SequenceLayout:
    """Return a new packing: documents with random bounds, each with some padding at its end.

    Args:
        workload: the sizes.
        seed: chooses the packing; the same on all ranks.

    Raises:
        ValueError: there are too many documents.
    """
    seq_len, multiple = workload.tokens * workload.cp_size, 2 * workload.cp_size
    most = seq_len // multiple
    if workload.documents == 0:
        return SequenceLayout.dense(seq_len, workload.cp_size)
    if workload.documents > most:
        raise ValueError(
            f"--documents must be in [0, {most}] (0: dense) for {seq_len} tokens on {workload.cp_size} ranks, "
            f"got {workload.documents}"
        )
    rng = np.random.default_rng(seed)
    cuts = rng.choice(most - 1, workload.documents - 1, replace=False) + 1
    bounds = multiple * np.concatenate([[0], np.sort(cuts), [most]])
    lengths = np.diff(bounds) - rng.integers(0, multiple, workload.documents)
    return SequenceLayout.packed(bounds, workload.cp_size, valid_lengths=lengths)


class Case:
    """The batch of a workload on this rank, with one layout and what its rolls must be. All methods share it."""

    def __init__(self, workload: Workload, group: dist.ProcessGroup, device: torch.device) -> None:
        self.workload, self.group, self.device = workload, group, device
        self.layout = new_layout(workload, seed=0)
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.layout.seq_len)
        # Nothing is zero, not even padding: a zero in a roll was put there.
        self._full = {name: torch.randint(1, 50_000, shape, generator=generator) for name in TENSORS}
        self._full["loss_mask"] = self._full["loss_mask"].float()
        self.batch = self._local(self._full)
        self.prepared_batch = self._local(prepare(self._full, self.layout, workload.depths))

    def _local(self, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: self.layout.shard(t, self.group.rank()).to(self.device) for n, t in full.items()}

    def differences(self, rolls: Rolls) -> tuple[int, int]:
        """Compare rolls with the oracle's.

        Returns:
            The number of tokens, of all tensors and depths, that differ; and how many of them should hold a valid
            token.
        """
        anywhere, at_valid = 0, 0
        for depth in range(1, self.workload.depths + 1):
            rolled = rolls.at(depth)
            valid = torch.from_numpy(self.layout.valid(self.group.rank(), depth))
            for name, tensor in self._full.items():
                expected = self.layout.shard(roll_reference(tensor, self.layout, depth), self.group.rank())
                found = rolled[name].cpu()
                # Past the end Megatron-LM's labels are 0, and ours are the index that the loss ignores.
                found = found.masked_fill(~valid & (found == fills_of().get(name, 0)), 0)
                differs = found != expected
                anywhere += int(differs.sum())
                at_valid += int((differs & valid).sum())
        return anywhere, at_valid
