"""What is exchanged, and the delays: the same for tokens and activations."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from harness.progress import Progress
from overlap_mtp import SequenceLayout, pad_documents
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.layout import Kind
from overlap_mtp.schedules.roller import Roller

Case = TypeVar("Case")
NUM_DEPTHS = 3
CASES = 12  # batches of a load, made before the clock starts
WINDOW = 6  # microbatches in flight
LONGEST_DELAY = 1_000_000  # cycles: 0.5 ms


@dataclass(frozen=True)
class Load:
    """What a window of microbatches has in common."""

    kind: Kind
    documents: int
    max_documents: int


LOADS = Load("zigzag", 8, 16), Load("zigzag", 60, 128), Load("contiguous", 8, 16)


def make_layout(load: Load, rng: random.Random, ranks: int, tokens: int) -> SequenceLayout:
    """Documents of random lengths. Some are shorter than the number of chunks, or end where a rank's tokens end.

    Args:
        load: says how many documents there are, and the kind of layout.
        rng: draws their lengths.
        ranks: that share the sequence.
        tokens: that each of them holds.
    """
    seq_len = ranks * tokens
    if load.kind == "contiguous":
        near = {rank * tokens + rng.randint(-4, 4) for rank in range(1, ranks)}
        cuts = near | {rng.randrange(1, seq_len) for _ in range(load.documents)}
        return SequenceLayout.packed([0, *sorted(cuts), seq_len], ranks, load.kind)
    lengths = [rng.choice([0, 1, 3, 8, 17, 30]) for _ in range(load.documents)]
    return pad_documents([torch.zeros(n) for n in lengths], ranks, load.kind, seq_len=seq_len)[1]


class Soak(ABC):
    """Exchanges of one kind over one transport, on one rank."""

    carries: str
    rollers: dict[Any, Roller]

    def __init__(self, group: dist.ProcessGroup, device: torch.device, transport: str) -> None:
        self.group, self.device, self.transport = group, device, transport
        self.common_rng, self.own_rng = random.Random(1), random.Random(1000 + group.rank())
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.exchanges = self.dropped = 0
        self._streams: list[Any] = []
        if device.type == "cuda":
            self._streams = [torch.cuda.current_stream(), exchange_group_of(group).side_stream(device)]

    def make_cases(self, make: Callable[[Load, int, int, int, torch.device], Case]) -> dict[Load, list[Case]]:
        """Make the batches of all loads. `make` gets the load, a seed, this rank, how many there are, the device."""
        rank, ranks = self.group.rank(), self.group.size()
        return {load: [make(load, seed, rank, ranks, self.device) for seed in range(CASES)] for load in LOADS}

    @abstractmethod
    def window(self) -> None:
        """Start some microbatches, and join them in another order; count the exchanges and what is wrong."""

    def run(self, exchanges: int, console: Console) -> dict[str, Any]:
        """Send `exchanges` exchanges or a few more; return the counts of all ranks' wrong words."""
        begin = time.perf_counter()
        what = f"exchanges of {self.carries} over {self.transport}"
        with Progress(exchanges, what, console) as progress:
            while self.exchanges < exchanges:
                before = self.exchanges
                self.window()
                progress.advance(min(self.exchanges, exchanges) - before)
        dist.all_reduce(self.wrong, group=self.group)
        wrong = int(self.wrong)  # waits for the device
        for roller in self.rollers.values():
            roller.close()
        return {
            "carries": self.carries,
            "transport": self.transport,
            "exchanges": self.exchanges,
            "dropped": self.dropped,
            "wrong_words": wrong,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def delay(self) -> None:
        """Now and then let a stream of this rank stand still for a while."""
        for stream in self._streams:
            if self.own_rng.random() < 0.05:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(self.own_rng.randrange(LONGEST_DELAY))  # type: ignore[no-untyped-call]
