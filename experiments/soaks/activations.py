"""A soak of activations, and of their gradients.

All numbers are small integers, so that any order of additions gives the same bits, in bfloat16, too. Each step has new
tensors, and what it leaves is overwritten: so memory that is freed too early shows as wrong numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_activation_roller
from overlap_mtp.reference import roll_reference
from overlap_mtp.schedules.roller import Rolls
from soaks.load import LOADS, NUM_DEPTHS, WINDOW, Load, Soak, make_layout

TOKENS = 512  # a rank
HIDDEN = {"embeddings": 256, "states": 72}
DTYPES = dict(zip(LOADS, (torch.bfloat16, torch.float32, torch.float32), strict=True))
NOTHING = -1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A batch on this rank, the gradients of its rolls, and what its rolls and gradients must be."""

    layout: SequenceLayout
    tensors: Tensors  # [1, L, H]
    rolls: Tensors  # [NUM_DEPTHS, 1, L, H]
    roll_gradients: Tensors  # [NUM_DEPTHS, 1, L, H]
    gradients: Tensors  # [ranks, 1, L, H]: what the rolls of each rank give the own rows


def make_case(load: Load, seed: int, rank: int, ranks: int, device: torch.device) -> Case:
    """Make a batch, and what must come of it."""
    layout = make_layout(load, random.Random(seed), ranks, TOKENS)
    generator = torch.Generator().manual_seed(seed)
    everywhere = torch.arange(layout.seq_len)
    sources = [roll_reference(everywhere, layout, k, NOTHING) for k in range(1, NUM_DEPTHS + 1)]
    parts: list[Tensors] = [{}, {}, {}, {}]
    for name, hidden in HIDDEN.items():
        full, *weights = (
            torch.randint(-8, 9, (layout.seq_len, hidden), generator=generator) for _ in range(1 + NUM_DEPTHS)
        )
        rolls = [torch.where((source == NOTHING)[:, None], 0, full[source]) for source in sources]
        gradients = [torch.zeros_like(full) for _ in range(ranks)]
        for user, gradient in enumerate(gradients):
            held = torch.from_numpy(layout.positions(user))
            for source, weight in zip(sources, weights, strict=True):
                used = held[source[held] != NOTHING]
                gradient.index_add_(0, source[used], weight[used])
        whole = full, torch.stack(rolls), torch.stack(weights), torch.stack(gradients)
        for part, one in zip(parts, whole, strict=True):
            own = layout.shard(one, rank, dim=-2).unsqueeze(-3)
            part[name] = own.to(device, DTYPES[load])
    return Case(layout, *parts)


class ActivationSoak(Soak):
    """Steps of three kinds: several exchanges and one backward; one whose rolls some ranks do not use; no backward."""

    carries = "activations"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, transport: str) -> None:
        super().__init__(group, device, transport)
        self._cases = self.make_cases(make_case)
        schedules = ("overlap",) if transport == "symmetric" else ("overlap", "merged")
        self.rollers = {
            (name, load): make_activation_roller(
                name, group, NUM_DEPTHS, load.max_documents, transport=transport
            )
            for name in schedules
            for load in LOADS
        }

    def window(self) -> None:
        name, load = self.common_rng.choice([*self.rollers])
        kinds = [self._step, self._without_gradients]
        if name == "overlap":  # with merged, every rank must take its rolls
            kinds.append(self._step_that_some_do_not_use)
        self.common_rng.choice(kinds)(name, load)
        if self.device.type == "cuda":  # the memory of what has just been freed
            for tensors in self._cases[load][0].rolls, self._cases[load][0].tensors:
                for tensor in tensors.values():
                    [torch.full_like(tensor, 99) for _ in range(WINDOW)]

    def _count(self, name: str, directions: int) -> None:
        self.exchanges += directions * (NUM_DEPTHS if name == "merged" else 1)

    def _start(self, name: str, load: Load) -> tuple[Case, Tensors, Tensors, Rolls]:
        """(a case, leaves, the tensors that are made from them, and their rolls)."""
        case = self.common_rng.choice(self._cases[load])
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in case.tensors.items()}
        born = {key: _Pause.apply(self, leaf) for key, leaf in leaves.items()}  # type: ignore[no-untyped-call]
        rolls = self.rollers[name, load].start(born, case.layout)
        return case, leaves, born, rolls

    def _join(self, case: Case, rolls: Rolls) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(rolls, which have been compared; their gradients, in new memory)."""
        self.delay()
        rolled = [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
        for key, tensor in case.rolls.items():
            self.wrong += (torch.stack([one[key].detach() for one in rolled]) != tensor).sum()
        outputs = [_Pause.apply(self, one[key]) for one in rolled for key in HIDDEN]  # type: ignore[no-untyped-call]
        gradients = [case.roll_gradients[key][at].clone() for at in range(NUM_DEPTHS) for key in HIDDEN]
        return outputs, gradients

    def _step(self, name: str, load: Load) -> None:
        """One backward of several exchanges, or two of the same graph."""
        started = [self._start(name, load) for _ in range(self.common_rng.randint(1, WINDOW))]
        self.common_rng.shuffle(started)
        joined = [self._join(case, rolls) for case, _, _, rolls in started]
        outputs, gradients = ([one for part in parts for one in part] for parts in zip(*joined, strict=True))
        passes = 1 + (self.common_rng.random() < 0.1)
        for number in range(passes):
            torch.autograd.backward(outputs, gradients, retain_graph=number + 1 < passes)
        for case, leaves, _, _ in started:
            self._compare(leaves, {key: passes * one.sum(0) for key, one in case.gradients.items()})
            self._count(name, 1 + passes)

    def _step_that_some_do_not_use(self, name: str, load: Load) -> None:
        """The loss of every rank uses the tensors themselves, too."""
        case, leaves, born, rolls = self._start(name, load)
        users = [rank for rank in range(self.group.size()) if self.common_rng.random() < 0.5]
        outputs: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        if self.group.rank() in users:
            outputs, gradients = self._join(case, rolls)
        del rolls
        outputs += [2 * one for one in born.values()]
        gradients += [torch.ones_like(one) for one in born.values()]
        torch.autograd.backward(outputs, gradients)
        self._compare(leaves, {key: 2 + one[users].sum(0) for key, one in case.gradients.items()})
        self._count(name, 2)

    @torch.no_grad()
    def _without_gradients(self, name: str, load: Load) -> None:
        started = [self._start(name, load) for _ in range(self.common_rng.randint(1, WINDOW))]
        self.common_rng.shuffle(started)
        for case, _, _, rolls in started:
            if name == "overlap" and self.common_rng.random() < 0.1:
                self.dropped += 1
            else:
                self._join(case, rolls)
            self._count(name, 1)

    def _compare(self, leaves: Tensors, expected: Tensors) -> None:
        for key, leaf in leaves.items():
            assert leaf.grad is not None
            self.wrong += (leaf.grad != expected[key]).sum()


class _Pause(torch.autograd.Function):
    """A copy. Its forward and its backward delay a stream now and then."""

    @staticmethod
    def forward(ctx: Any, soak: Soak, tensor: torch.Tensor) -> torch.Tensor:
        ctx.soak = soak
        soak.delay()
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.soak.delay()
        return None, gradient.clone()
