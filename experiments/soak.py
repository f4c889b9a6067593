"""Does a bit ever go wrong? Many exchanges, several in flight, every stream and rank delayed at random.

    python experiments/soak.py --exchanges 100000 --out experiments/results/rolls_alone/2xH200
    python experiments/soak.py --device cpu --exchanges 200

Starts up to six microbatches, each with a new layout, and joins them in another order; some are dropped. Compares all
rolls with those made from the full batch. A third has few documents, a third has many, in messages of several parts,
and a third has contiguous layouts, whose messages go one way: a rank runs ahead until acknowledgements are missing.
Writes `soak.json` into `--out`; exits with 1 if a bit was wrong.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from harness import environment
from harness.command import (
    RanksAndTransports,
    SmallSize,
    TransportOptions,
    check_least,
    check_out,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from harness.progress import Progress
from harness.rounds import rank_console
from overlap_mtp import SequenceLayout, make_roller, pad_documents, prepare, prepared_name
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.layout import Kind
from overlap_mtp.schedules.roller import Rolls

NUM_DEPTHS = 3
TOKENS = 1024  # a rank
CASES = 24  # batches of a load, made before the clock starts
WINDOW = 6  # microbatches in flight
LONGEST_DELAY = 1_000_000  # cycles: 0.5 ms
SCHEDULES = ("prefetch", "overlap", "merged", "batched")


@dataclass(frozen=True)
class Load:
    """What a window of microbatches has in common."""

    kind: Kind
    documents: int
    max_documents: int


LOADS = Load("zigzag", 8, 16), Load("zigzag", 60, 128), Load("contiguous", 8, 16)


@dataclass(frozen=True)
class Options:
    """How long to run."""

    exchanges: int = 100_000
    """Exchanges over each transport."""
    out: Path = Path("out/soak")
    """Folder for the record."""
    where: RanksAndTransports = field(default_factory=TransportOptions)


ON_CPU = SmallSize(
    Options(exchanges=10_000),
    "40 s",
    "--exchanges 100000",
    "5 min",
)


@dataclass(frozen=True)
class Case:
    """A batch on this rank and what its rolls must be."""

    layout: SequenceLayout
    batch: dict[str, torch.Tensor]
    rolls: dict[str, torch.Tensor]  # [NUM_DEPTHS, L]


def make_layout(load: Load, rng: random.Random, ranks: int) -> SequenceLayout:
    """Documents of random lengths. Some are shorter than the number of chunks, or end where a rank's tokens end."""
    seq_len = ranks * TOKENS
    if load.kind == "contiguous":
        near = {rank * TOKENS + rng.randint(-4, 4) for rank in range(1, ranks)}
        cuts = near | {rng.randrange(1, seq_len) for _ in range(load.documents)}
        return SequenceLayout.packed([0, *sorted(cuts), seq_len], ranks, load.kind)
    lengths = [rng.choice([0, 1, 3, 8, 17, 30]) for _ in range(load.documents)]
    return pad_documents([torch.zeros(n) for n in lengths], ranks, load.kind, seq_len=seq_len)[1]


def make_case(load: Load, seed: int, rank: int, ranks: int, device: torch.device) -> Case:
    """Make a batch, and its rolls."""
    layout = make_layout(load, random.Random(seed), ranks)
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


class Soak:
    """One transport under load on one rank."""

    def __init__(self, device: torch.device, transport: str) -> None:
        group = dist.group.WORLD
        assert group is not None
        self.transport, rank = transport, group.rank()
        self.cases = {
            load: [make_case(load, seed, rank, group.size(), device) for seed in range(CASES)]
            for load in LOADS
        }
        self.rollers = {
            (name, load): make_roller(name, group, NUM_DEPTHS, transport, load.max_documents)
            for name in SCHEDULES
            for load in LOADS
        }
        self.common_rng, self.own_rng = random.Random(1), random.Random(1000 + rank)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.streams: list[Any] = []
        if device.type == "cuda":
            self.streams = [torch.cuda.current_stream(), exchange_group_of(group).side_stream(device)]
        self.exchanges = self.dropped = 0

    def run(self, exchanges: int, console: Console) -> dict[str, Any]:
        """Send `exchanges` exchanges or a few more; return the counts of all ranks' wrong words."""
        begin = time.perf_counter()
        with Progress(exchanges, f"exchanges over {self.transport}", console) as progress:
            while self.exchanges < exchanges:
                before = self.exchanges
                self._window()
                progress.advance(min(self.exchanges, exchanges) - before)
        dist.all_reduce(self.wrong)
        wrong = int(self.wrong)  # waits for the device
        for roller in self.rollers.values():
            roller.close()
        return {
            "transport": self.transport,
            "exchanges": self.exchanges,
            "dropped": self.dropped,
            "wrong_words": wrong,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def _window(self) -> None:
        """Start some microbatches, join them in another order, and drop one now and then."""
        name, load = self.common_rng.choice(SCHEDULES), self.common_rng.choice(LOADS)
        started: list[tuple[Case, Rolls]] = []
        for _ in range(self.common_rng.randint(1, WINDOW)):
            case = self.common_rng.choice(self.cases[load])
            self._delay()
            started.append((case, self.rollers[name, load].start(case.batch, case.layout)))
        self.common_rng.shuffle(started)
        for case, rolls in started:
            if name == "prefetch" and self.common_rng.random() < 0.02:
                self.dropped += 1
                self.exchanges += 1
                continue
            self._delay()
            rolled = [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
            for key, tensor in case.rolls.items():
                self.wrong += (torch.cat([one[key] for one in rolled]) != tensor).sum()
            self.exchanges += 1 if name in ("prefetch", "batched") else NUM_DEPTHS

    def _delay(self) -> None:
        """Now and then let a stream of this rank stand still for a while."""
        for stream in self.streams:
            if self.own_rng.random() < 0.05:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(self.own_rng.randrange(LONGEST_DELAY))  # type: ignore[no-untyped-call]


def soak_on_rank(device: torch.device, exchanges: int, transports: tuple[str, ...], out: Path) -> None:
    """Run one rank; rank 0 writes the record."""
    console = rank_console()
    runs = [Soak(device, transport).run(exchanges, console) for transport in transports]
    if dist.get_rank() == 0:
        where = environment.describe(device, dist.get_world_size())
        record = {"experiment": "soak", "command": environment.command(), "where": where, "runs": runs}
        write_record(record, out / "soak.json")
        console.print(runs)


def main() -> None:
    options = parse_options(
        Options, "Send many exchanges over each transport and count wrong words.", ON_CPU.options
    )
    with usage_errors():
        check_least(options, exchanges=1)
        where, out = options.where, options.out
        where.check()
        if where.count < 2:
            raise ValueError(f"a soak needs at least 2 ranks, got {where.count}")
        check_out(out, "soak.json")
    ON_CPU.say(options)
    run_on_ranks(soak_on_rank, where.ranks, where.device, options.exchanges, where.chosen, out)
    if os.environ.get("RANK", "0") != "0":  # rank 0 has the record
        return
    if any(run["wrong_words"] for run in json.loads((out / "soak.json").read_text())["runs"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
