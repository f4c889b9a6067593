"""One microbatch's rolls as a thing to time: what is rolled, who rolls it, and whether the bits are right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from latency import megatron_rolls
from overlap_mtp import SequenceLayout, make_roller, prepare, roll_reference
from overlap_mtp.schedules.roller import Rolls

EXCHANGING = ("merged", "overlap", "prefetch")  # the schedules that a transport matters to
MEGATRON = "megatron"
MAX_DOCUMENTS = 128  # what messages are sized for: the default of make_roller
TENSORS = ("input_ids", "labels", "position_ids", "loss_mask")


@dataclass(frozen=True)
class Workload:
    """What is rolled: four tensors of batch size 1. `documents` 1 is a dense sequence, more are packed."""

    cp_size: int
    depths: int
    documents: int
    tokens: int  # of a rank


@dataclass(frozen=True)
class Method:
    """Who rolls: a schedule and its transport, or Megatron-LM and where its cu_seqlens lie (host, device)."""

    schedule: str
    transport: str = ""

    def __str__(self) -> str:
        return f"{self.schedule} {self.transport}".rstrip()


@dataclass(frozen=True)
class Configuration:
    workload: Workload
    method: Method


def new_layout(workload: Workload, seed: Sequence[int]) -> SequenceLayout:
    """A new packing of the workload's documents: random bounds, the last tokens of each of them padding."""
    seq_len, unit = workload.tokens * workload.cp_size, 2 * workload.cp_size
    if workload.documents == 1:
        return SequenceLayout.dense(seq_len, workload.cp_size)
    if workload.tokens % 2 or workload.documents > seq_len // unit:
        raise ValueError(
            f"tokens must be even and documents in [1, {seq_len // unit}] for {workload.tokens} tokens a rank, "
            f"got {workload.documents} documents"
        )
    rng = np.random.default_rng(list(seed))
    cuts = rng.choice(seq_len // unit - 1, workload.documents - 1, replace=False) + 1
    bounds = unit * np.concatenate([[0], np.sort(cuts), [seq_len // unit]])
    return SequenceLayout.packed(
        bounds,
        workload.cp_size,
        valid_lengths=np.diff(bounds) - rng.integers(0, unit, workload.documents),
    )


class Case:
    """The batch of a workload on this rank, with one layout and what its rolls must be. Shared by all methods."""

    def __init__(self, workload: Workload, group: dist.ProcessGroup, device: torch.device, seed: int) -> None:
        self.workload, self.group, self.device = workload, group, device
        self.layout = new_layout(workload, (seed, 0))
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.layout.seq_len)
        # Nothing is zero, padding neither: a zero in a roll was put there.
        self._full = {name: torch.randint(1, 50_000, shape, generator=generator) for name in TENSORS}
        self._full["loss_mask"] = self._full["loss_mask"].float()
        self.batch = self._local(self._full)
        everything = prepare(self._full, self.layout, workload.depths)
        self.prepared_batch = self._local(everything)

    def _local(self, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: self.layout.shard(t, self.group.rank()).to(self.device) for n, t in full.items()}

    def differences(self, rolls: Rolls) -> tuple[int, int]:
        """Slots of all tensors and depths that differ from the oracle, and those of them with a valid token."""
        anywhere, at_valid = 0, 0
        for depth in range(1, self.workload.depths + 1):
            rolled = rolls.at(depth)
            valid = torch.from_numpy(self.layout.valid(self.group.rank(), depth))
            for name, tensor in self._full.items():
                expected = self.layout.shard(roll_reference(tensor, self.layout, depth), self.group.rank())
                differs = rolled[name].cpu() != expected
                anywhere += int(differs.sum())
                at_valid += int((differs & valid).sum())
        return anywhere, at_valid


@dataclass(eq=False)
class Candidate:
    """One configuration on this rank, and what was measured of it."""

    configuration: Configuration
    case: Case
    roller: Any = None
    differs: tuple[int, int] = (0, 0)  # slots from the oracle, and those of them with a valid token
    sent: tuple[int, int] | None = None  # messages and bytes; None where nobody counts them
    rounds: int = 0
    is_short: bool = False  # enough to be repeated in a round
    cold_us: list[float] = field(default_factory=list)  # host time right behind another configuration
    host_us: list[float] = field(default_factory=list)  # and when repeated
    wall_us: list[float] = field(default_factory=list)
    gpu_us: list[float] = field(default_factory=list)
    failed: str | None = None
    graph_failed: str | None = None

    def open(self) -> None:
        """Makes the roller; collective at its first roll only. Raises ValueError where there is none."""
        workload, method = self.configuration.workload, self.configuration.method
        if method.schedule == MEGATRON:
            self.roller = megatron_rolls.MegatronRoller(self.case.group, method.transport, self.case.device)
        else:
            self.roller = make_roller(
                method.schedule,
                self.case.group,
                workload.depths,
                transport=method.transport or "auto",
                max_documents=max(MAX_DOCUMENTS, workload.documents),
            )

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        prepared = self.configuration.method.schedule == "prepared"
        return self.case.prepared_batch if prepared else self.case.batch

    def argument(self, layout: SequenceLayout) -> Any:
        """What the roller is told of a packing: made by a data loader, outside the clock."""
        return self.roller.argument(layout) if self.configuration.method.schedule == MEGATRON else layout

    def roll(self, argument: Any) -> Rolls:
        """One microbatch: start, and every depth joined."""
        rolls: Rolls = self.roller.start(self.batch, argument)
        for depth in range(1, self.configuration.workload.depths + 1):
            rolls.at(depth)
        return rolls

    def sample(self, argument: Any) -> tuple[float, float]:
        """Host time inside start and joins, and wall time until the device is done, in µs."""
        begin = time.perf_counter()
        rolls = self.roll(argument)
        launched = time.perf_counter()
        self.finish()
        done = time.perf_counter()
        del rolls
        return 1e6 * (launched - begin), 1e6 * (done - begin)

    @property
    def captured(self) -> int:
        """Microbatches in one CUDA graph: a roller has eight slots."""
        exchanges = (
            1 if self.configuration.method.schedule == "prefetch" else self.configuration.workload.depths
        )
        return max(1, 8 // exchanges)

    def finish(self) -> None:
        """Waits for the device."""
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()

    def verify(self) -> None:
        """Compares the rolls of the case's own layout with the oracle's, and counts what was sent for them."""
        self.differs = self.case.differences(self.roll(self.argument(self.case.layout)))
        traffic = getattr(self.roller, "traffic", None)
        if traffic is not None:
            self.sent = traffic.messages, traffic.bytes
