"""The exchanges of activations that a model starts: a roller for each use.

| use | started | joined |
|---|---|---|
| `embeddings` (`MultiTokenPrediction.start_embeddings`) | when half of the layers are launched | at depth 1 |
| `hidden_0` .. (`overlap_mtp.model.mixing`) | where depth j has given hidden states | at depth j + 2 |
| `teacher` (`overlap_mtp.model.distillation`) | at the end of the trunk | at the loss of depth 1 |

All are started and joined outside of recomputed functions, which take the rolls as inputs: nothing is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from overlap_mtp.layout import SequenceLayout
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES, WITH_NONE, make_activation_roller
from overlap_mtp.schedules.roller import Roller, Rolls


@dataclass(frozen=True)
class RolledRows:
    """The rolls of one tensor of activations."""

    rolls: Rolls
    name: str

    def at(self, depth: int) -> torch.Tensor:
        """Return the rows `depth` ahead. The first call waits for the exchange."""
        return self.rolls.at(depth)[self.name]


class ActivationRollers:
    """The rollers of a model's activations. Each is made at its first use, at the same place on all ranks.

    Args:
        schedule, cp_group, max_documents: as in `make_activation_roller`.
        transport: the same, for schedule "overlap" without tp ranks. Others take the process group.

    Raises:
        ValueError: if the schedule is unknown.
    """

    def __init__(
        self,
        schedule: str,
        cp_group: dist.ProcessGroup | None,
        max_documents: int,
        transport: str = "auto",
    ) -> None:
        if schedule not in WITH_NONE:
            legal = ", ".join(ACTIVATION_SCHEDULES)
            raise ValueError(f"activation_schedule must be one of {legal}, got {schedule!r}")
        self._schedule, self._cp_group, self._max_documents = schedule, cp_group, max_documents
        self._transport = transport
        # The ranks that share the tokens of a cp rank, in rank order. Set it before the first `start`.
        self.tp_group: dist.ProcessGroup | None = None
        self._rollers: dict[str, Roller] = {}  # by use

    @property
    def tp(self) -> tuple[int, int]:
        """This rank in the tp group, and the group's size."""
        return (0, 1) if self.tp_group is None else (self.tp_group.rank(), self.tp_group.size())

    def __iter__(self) -> Iterator[Roller]:
        """The rollers that were used."""
        return iter(self._rollers.values())

    def start(self, use: str, rows: torch.Tensor, num_depths: int, layout: SequenceLayout) -> RolledRows:
        """Start the exchange of one use. All ranks of the cp group call it in the same order.

        Args:
            use: names the use. Its `num_depths` and the kind of its rows stay the same.
            rows: [B, L, hidden]; with a tp group, this tp rank's part of the L tokens.
            num_depths: how many depths `at` will be asked for.
            layout: of the batch.

        Returns:
            The rolls, differentiable.

        Raises:
            ValueError, RuntimeError: as `Roller.start` does.
        """
        return RolledRows(self.roller(use, num_depths).start({use: rows}, layout), use)

    def roller(self, use: str, num_depths: int) -> Roller:
        """Return the roller of a use."""
        if use not in self._rollers:
            is_free = self._schedule == "overlap" and self.tp[1] == 1
            self._rollers[use] = make_activation_roller(
                self._schedule,
                self._cp_group,
                num_depths,
                self._max_documents,
                tp_group=self.tp_group,
                transport=self._transport if is_free else "process_group",
            )
        return self._rollers[use]
