"""One schedule's training step, launched op by op or as one CUDA graph."""

from __future__ import annotations

import gc
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout
from overlap_mtp.model.activations import ActivationRollers, RolledRows
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine
from overlap_mtp.schedules.roller import Roller
from overlap_mtp.schedules.timed import Cost, TimedRoller

Batch = dict[str, torch.Tensor]
Rolled = dict[tuple[str, int], torch.Tensor]  # by name and depth
WARM_UPS = 3  # eager steps before a capture, as torch's documentation of CUDA graphs asks for


class Spent(NamedTuple):
    """What the rolls of a step cost this rank. Stalls are NaN on CPU, all times are in captured graphs."""

    host_us: float
    stall_us: float
    backward_host_us: float  # of activations
    backward_stall_us: float
    messages: int
    bytes: int


class EagerStep:
    """Forward and backward of a model with a schedule."""

    def __init__(self, model: GPT, roller: Roller, forward_only: bool) -> None:
        self.model = model
        self.timed = TimedRoller(roller)
        self.forward_only = forward_only
        self._input: tuple[Batch, SequenceLayout, torch.Tensor]
        self._sent = (0, 0)  # messages and bytes until the last `spent`

    @property
    def compared(self) -> list[TimedRoller]:
        """The rollers whose schedule is compared."""
        return [self.timed]

    def rolled(self) -> Rolled:
        """Return what they rolled in the last step."""
        return {
            (name, depth): tensor.detach()
            for one in self.compared
            for depth in range(1, one.roller.num_depths + 1)
            for name, tensor in one.rolls.at(depth).items()
        }

    def spent(self) -> Spent:
        """Return what they cost since the last call. The device must have finished."""
        forward = _sum([one.forward.read() for one in self.compared])
        backward = _sum([one.backward.read() for one in self.compared])
        before, traffic = self._sent, [one.roller.traffic for one in self.compared]
        self._sent = sum(one.messages for one in traffic), sum(one.bytes for one in traffic)
        return Spent(*forward, *backward, self._sent[0] - before[0], self._sent[1] - before[1])

    def load(self, batch: Batch, layout: SequenceLayout, counts: torch.Tensor) -> None:
        """Set the input of the next step. The step's time does not include this: a data loader would do it.

        Args:
            batch: this rank's tensors, each [B, L].
            layout: who holds which token.
            counts: the numbers of tokens that the losses are divided by.
        """
        self._input = batch, layout, counts

    def run(self) -> torch.Tensor:
        """Run a step and return its loss, detached. Gradients are left in the parameters."""
        batch, layout, counts = self._input
        with torch.set_grad_enabled(not self.forward_only):
            loss = combine(self.model(batch, layout, self.timed), counts, self.model.config.mtp_loss_factor)
            if not self.forward_only:
                loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def close(self) -> None:
        """Close the rollers."""
        for one in self.compared:
            one.roller.close()


class ActivationStep(EagerStep):
    """Forward and backward of a model whose depths use activations of other ranks, with a schedule of these rolls.

    `roller` rolls the tokens, at no cost if the batch is prepared.
    """

    def __init__(self, model: GPT, roller: Roller, forward_only: bool, activations: TimedActivations) -> None:
        super().__init__(model, roller, forward_only)
        self._activations = activations

    @property
    def compared(self) -> list[TimedRoller]:
        return list(self._activations.timed.values())

    def run(self) -> torch.Tensor:
        self.model.mtp.activations = self._activations
        return super().run()

    def close(self) -> None:
        super().close()
        self.timed.roller.close()


class TimedActivations(ActivationRollers):
    """The rollers of a model's activations. They say what they cost."""

    def __init__(
        self, schedule: str, cp_group: dist.ProcessGroup | None, max_documents: int, transport: str
    ) -> None:
        super().__init__(schedule, cp_group, max_documents, transport)
        self.timed: dict[str, TimedRoller] = {}  # by use

    def start(self, use: str, rows: torch.Tensor, num_depths: int, layout: SequenceLayout) -> RolledRows:
        if use not in self.timed:
            self.timed[use] = TimedRoller(self.roller(use, num_depths))
        return RolledRows(self.timed[use].start({use: rows}, layout), use)


def _sum(costs: list[Cost]) -> tuple[float, float]:
    """(host µs, stall µs) of all together. A use without a backward adds nothing to the stall."""
    called = [one for one in costs if one.host_us > 0]
    stalls = [math.nan if one.stall_us is None else one.stall_us for one in called]
    return sum(one.host_us for one in called), sum(stalls) if called else math.nan


class CapturedStep(EagerStep):
    """The same as one CUDA graph that holds the exchange too: captured for the first batch, then replayed.

    All batches must have the first one's dense layout. The next step overwrites loss and gradients.
    """

    def __init__(self, model: GPT, roller: Roller, forward_only: bool) -> None:
        super().__init__(model, roller, forward_only)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: torch.Tensor
        self._gradients: list[torch.Tensor | None] = []
        self._traffic = (0, 0)  # messages and bytes of a replay

    def load(self, batch: Batch, layout: SequenceLayout, counts: torch.Tensor) -> None:
        if self._graph is None:
            self._capture({name: tensor.clone() for name, tensor in batch.items()}, layout, counts.clone())
        own, _, own_counts = self._input
        for name, tensor in batch.items():
            own[name].copy_(tensor)
        own_counts.copy_(counts)

    def run(self) -> torch.Tensor:
        assert self._graph is not None
        self._graph.replay()
        self.timed.roller.raise_if_failed()
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def spent(self) -> Spent:
        """Return what a replay sends. Its times are not known: neither host nor streams run the calls."""
        return Spent(math.nan, math.nan, math.nan, math.nan, *self._traffic)

    def _capture(self, batch: Batch, layout: SequenceLayout, counts: torch.Tensor) -> None:
        super().load(batch, layout, counts)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.model.zero_grad()
                super().run()
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        traffic = self.timed.roller.traffic
        messages, sent_bytes = traffic.messages, traffic.bytes
        with torch.cuda.graph(self._graph):
            self._loss = super().run()
        self._traffic = traffic.messages - messages, traffic.bytes - sent_bytes
        self._gradients = [parameter.grad for parameter in self.model.parameters()]

    def close(self) -> None:
        """Reset the graph. The process group can be destroyed only after that: the graph holds its communicators."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
            gc.collect()
            torch.cuda.synchronize()
        super().close()
