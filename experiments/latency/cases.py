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

EXCHANGING = ("merged", "overlap", "prefetch")  # the schedules that run over a choice of transports
MEGATRON = "megatron"
MAX_DOCUMENTS = 128  # what messages are sized for: the default of make_roller
TENSORS = ("input_ids", "labels", "position_ids", "loss_mask")


@dataclass(frozen=True)
class Workload:
    """What is rolled: four tensors of batch size 1. One document is a dense sequence, more are packed."""

    cp_size: int
    depths: int
    documents: int
    tokens: int  # of a rank

    def __str__(self) -> str:
        documents = "dense" if self.documents == 1 else f"{self.documents} docs"
        return f"D={self.depths}, {documents}, {self.tokens}"


@dataclass(frozen=True)
class Method:
    """Who rolls: a schedule and its transport, or Megatron-LM and where its cu_seqlens lie (host, device)."""

    schedule: str
    transport: str = ""

    def __str__(self) -> str:
        return f"{self.schedule} {self.transport}".rstrip()

    def exchanges(self, depths: int) -> int:
        """Return how many exchanges follow one another in a microbatch."""
        return 1 if self.schedule == "prefetch" else depths


@dataclass(frozen=True)
class Configuration:
    """A method at a workload."""

    workload: Workload
    method: Method


def new_layout(workload: Workload, seed: Sequence[int]) -> SequenceLayout:
    """Return a new packing: documents with random bounds, each with some padding at its end.

    Args:
        workload: the sizes.
        seed: numbers that choose the packing, the same on all ranks.

    Raises:
        ValueError: there are too many documents, or the tokens are odd.
    """
    seq_len, multiple = workload.tokens * workload.cp_size, 2 * workload.cp_size
    most = seq_len // multiple
    if workload.documents == 1:
        return SequenceLayout.dense(seq_len, workload.cp_size)
    if workload.tokens % 2 or workload.documents > most:
        raise ValueError(
            f"tokens must be even and documents in [1, {most}] for {workload.tokens} tokens a rank, "
            f"got {workload.documents} documents"
        )
    rng = np.random.default_rng(list(seed))
    cuts = rng.choice(most - 1, workload.documents - 1, replace=False) + 1
    bounds = multiple * np.concatenate([[0], np.sort(cuts), [most]])
    lengths = np.diff(bounds) - rng.integers(0, multiple, workload.documents)
    return SequenceLayout.packed(bounds, workload.cp_size, valid_lengths=lengths)


class Case:
    """The batch of a workload on this rank, with one layout and what its rolls must be. All methods share it."""

    def __init__(self, workload: Workload, group: dist.ProcessGroup, device: torch.device, seed: int) -> None:
        self.workload, self.group, self.device = workload, group, device
        self.layout = new_layout(workload, (seed, 0))
        generator = torch.Generator().manual_seed(seed)
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
    differs: tuple[int, int] = (0, 0)  # as of Case.differences
    sent: tuple[int, int] | None = None  # messages and bytes; None if nobody counts them
    rounds: int = 0
    is_short: bool = False  # short enough to be repeated in a round
    cold_us: list[float] = field(default_factory=list)  # host time directly after another configuration
    host_us: list[float] = field(default_factory=list)  # host time of repetitions
    wall_us: list[float] = field(default_factory=list)
    gpu_us: list[float] = field(default_factory=list)
    failed: str | None = None
    graph_failed: str | None = None

    def open(self) -> None:
        """Make the roller. Raises ValueError if it cannot work here."""
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

    def argument(self, layout: SequenceLayout) -> Any:
        """Return what the roller is told about a packing. A data loader would make it, so it is not timed."""
        return self.roller.argument(layout) if self.configuration.method.schedule == MEGATRON else layout

    def roll(self, argument: Any) -> Rolls:
        """Roll one microbatch: start, then join every depth."""
        is_prepared = self.configuration.method.schedule == "prepared"
        batch = self.case.prepared_batch if is_prepared else self.case.batch
        rolls: Rolls = self.roller.start(batch, argument)
        for depth in range(1, self.configuration.workload.depths + 1):
            rolls.at(depth)
        return rolls

    def sample(self, argument: Any) -> tuple[float, float]:
        """Return the host time inside start and joins, and the wall time until the device is done, in µs."""
        begin = time.perf_counter()
        rolls = self.roll(argument)
        launched = time.perf_counter()
        self.finish()
        done = time.perf_counter()
        del rolls
        return 1e6 * (launched - begin), 1e6 * (done - begin)

    def finish(self) -> None:
        """Wait for the device."""
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def captured(self) -> int:
        """Microbatches in one CUDA graph: a roller has buffers for eight exchanges."""
        return max(1, 8 // self.configuration.method.exchanges(self.configuration.workload.depths))

    def verify(self) -> None:
        """Compare the rolls of the case's own layout with the oracle's, and count what was sent for them."""
        self.differs = self.case.differences(self.roll(self.argument(self.case.layout)))
        traffic = getattr(self.roller, "traffic", None)
        if traffic is not None:
            self.sent = traffic.messages, traffic.bytes
