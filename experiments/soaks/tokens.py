"""A soak of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.distributed as dist

from overlap_mtp import SequenceLayout, make_roller, prepare, prepared_name
from overlap_mtp.schedules.roller import Rolls
from soaks.load import LOADS, NUM_DEPTHS, WINDOW, Load, Soak, make_layout

TOKENS = 1024  # a rank
SCHEDULES = ("prefetch", "overlap", "merged", "batched")


@dataclass(frozen=True)
class Case:
    """A batch on this rank and what its rolls must be."""

    layout: SequenceLayout
    batch: dict[str, torch.Tensor]
    rolls: dict[str, torch.Tensor]  # [NUM_DEPTHS, L]


def make_case(load: Load, seed: int, rank: int, ranks: int, device: torch.device) -> Case:
    """Make a batch, and its rolls."""
    layout = make_layout(load, random.Random(seed), ranks, TOKENS)
    generator = torch.Generator().manual_seed(seed)
    full = {
        "input_ids": torch.randint(2**40, (1, layout.seq_len), generator=generator),
        "loss_mask": torch.rand(1, layout.seq_len, generator=generator),
    }
    local = {n: layout.shard(t, rank).to(device) for n, t in prepare(full, layout, NUM_DEPTHS).items()}
    rolls = {
        name: torch.cat([local[prepared_name(name, depth)] for depth in range(1, NUM_DEPTHS + 1)])
        for name in full
    }
    return Case(layout, {name: local[name] for name in full}, rolls)


class TokenSoak(Soak):
    """Joins up to six microbatches in another order than it started them; some are dropped."""

    carries = "tokens"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, transport: str) -> None:
        super().__init__(group, device, transport)
        self.cases = self.make_cases(make_case)
        self.rollers = {
            (name, load): make_roller(name, group, NUM_DEPTHS, transport, load.max_documents)
            for name in SCHEDULES
            for load in LOADS
        }

    def window(self) -> None:
        name, load = self.common_rng.choice(SCHEDULES), self.common_rng.choice(LOADS)
        started: list[tuple[Case, Rolls]] = []
        for _ in range(self.common_rng.randint(1, WINDOW)):
            case = self.common_rng.choice(self.cases[load])
            self.delay()
            started.append((case, self.rollers[name, load].start(case.batch, case.layout)))
        self.common_rng.shuffle(started)
        for case, rolls in started:
            if name == "prefetch" and self.common_rng.random() < 0.02:
                self.dropped += 1
                self.exchanges += 1
                continue
            self.delay()
            rolled = [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
            for key, tensor in case.rolls.items():
                self.wrong += (torch.cat([one[key] for one in rolled]) != tensor).sum()
            self.exchanges += 1 if name in ("prefetch", "batched") else NUM_DEPTHS
