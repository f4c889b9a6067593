"""One schedule's training step, launched op by op or as one CUDA graph."""

from __future__ import annotations

import gc

import torch

from overlap_mtp import SequenceLayout
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.loss import combine
from overlap_mtp.schedules.roller import Roller, Rolls
from overlap_mtp.schedules.timed import TimedRoller

Batch = dict[str, torch.Tensor]
WARM_UPS = 3  # eager steps before a capture, as torch's documentation of CUDA graphs asks for


class EagerStep:
    """Forward and backward of a model with a schedule."""

    def __init__(self, model: GPT, roller: Roller, forward_only: bool) -> None:
        self.model = model
        self.timed = TimedRoller(roller)
        self.forward_only = forward_only
        self._input: tuple[Batch, SequenceLayout, torch.Tensor]

    @property
    def rolls(self) -> Rolls:
        """The rolls of the last step."""
        return self.timed.rolls

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
        """Close the roller."""
        self.timed.roller.close()


class CapturedStep(EagerStep):
    """The same as one CUDA graph that holds the exchange too: captured for the first batch, then replayed.

    All batches must have the first one's dense layout. The next step overwrites loss and gradients.
    """

    def __init__(self, model: GPT, roller: Roller, forward_only: bool) -> None:
        super().__init__(model, roller, forward_only)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: torch.Tensor
        self._gradients: list[torch.Tensor | None] = []

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
        with torch.cuda.graph(self._graph):
            self._loss = super().run()
        self._gradients = [parameter.grad for parameter in self.model.parameters()]

    def close(self) -> None:
        """Reset the graph. The process group can be destroyed only after that: the graph holds its communicators."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
            gc.collect()
            torch.cuda.synchronize()
        super().close()
