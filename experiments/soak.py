"""Does a bit ever go wrong? Many exchanges, several under method, every stream and rank delayed at random.

    python experiments/soak.py --exchanges 100000 --out experiments/results/2xH200
    python experiments/soak.py --device cpu --exchanges 200

Windows of up to six microbatches with a new layout each are started, joined in another order, some of them dropped;
all rolls are compared with those made from the full batch. Writes `soak.json` into `--out`; exits with 1 where a bit
was wrong.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from harness import environment
from harness.launch import run_on_ranks
from overlap_mtp import SequenceLayout, make_roller, pad_documents, prepare, prepared_name
from overlap_mtp.exchange.group import exchange_group_of
from overlap_mtp.schedules.roller import Rolls

NUM_DEPTHS = 3
TOKENS = 64  # a rank: short chunks, so that tokens come from several peers
KINDS = 24  # of batches, made before the clock starts
WINDOW = 6  # microbatches under method
LONGEST_DELAY = 1_000_000  # cycles: 0.5 ms
SCHEDULES = ("prefetch", "overlap", "merged")


@dataclass(frozen=True)
class Case:
    """A batch on this rank and what its rolls must be."""

    layout: SequenceLayout
    batch: dict[str, torch.Tensor]
    rolls: dict[str, torch.Tensor]  # [NUM_DEPTHS, L]


def make_case(seed: int, rank: int, ranks: int, device: torch.device) -> Case:
    """Documents of random lengths, some shorter than a chunk can be cut."""
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 3, 8, 17, 30]) for _ in range(8)]
    _, layout = pad_documents([torch.zeros(n) for n in lengths], ranks, seq_len=ranks * TOKENS * 4)
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
        self.device, self.transport, rank = device, transport, group.rank()
        self.cases = [make_case(seed, rank, group.size(), device) for seed in range(KINDS)]
        self.rollers = {name: make_roller(name, group, NUM_DEPTHS, transport, 16) for name in SCHEDULES}
        self.alike, self.own = random.Random(1), random.Random(1000 + rank)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.streams: list[Any] = []
        if device.type == "cuda":
            self.streams = [torch.cuda.current_stream(), exchange_group_of(group).side_stream(device)]
        self.exchanges = self.dropped = 0

    def run(self, exchanges: int) -> dict[str, Any]:
        begin = time.perf_counter()
        while self.exchanges < exchanges:
            self._window()
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
        name = self.alike.choice(SCHEDULES)
        flights: list[tuple[Case, Rolls]] = []
        for _ in range(self.alike.randint(1, WINDOW)):
            case = self.alike.choice(self.cases)
            self._delay()
            flights.append((case, self.rollers[name].start(case.batch, case.layout)))
        self.alike.shuffle(flights)
        for case, rolls in flights:
            if name == "prefetch" and self.alike.random() < 0.02:
                self.dropped += 1
                self.exchanges += 1
                continue
            self._delay()
            rolled = [rolls.at(depth) for depth in range(1, NUM_DEPTHS + 1)]
            for key, tensor in case.rolls.items():
                self.wrong += (torch.cat([one[key] for one in rolled]) != tensor).sum()
            self.exchanges += 1 if name == "prefetch" else NUM_DEPTHS

    def _delay(self) -> None:
        """Now and then a stream of this rank stands still for a while."""
        for stream in self.streams:
            if self.own.random() < 0.05:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(self.own.randrange(LONGEST_DELAY))  # type: ignore[no-untyped-call]


def main(
    exchanges: Annotated[int, typer.Option(min=1, help="With each transport.")] = 100_000,
    transports: Annotated[str | None, typer.Option(help="Comma-separated; default: all there are.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    out: Annotated[Path, typer.Option()] = Path("out/soak"),
) -> None:
    """Sends many exchanges over each transport and counts wrong words."""
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    chosen = transports or ("process_group,symmetric" if on_gpu else "process_group")
    try:
        run_on_ranks(soak_on_rank, ranks, device, exchanges, chosen.split(","), out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    wrong = [run["wrong_words"] for run in json.loads((out / "soak.json").read_text())["runs"]]
    raise typer.Exit(1 if any(wrong) else 0)


def soak_on_rank(device: torch.device, exchanges: int, transports: list[str], out: Path) -> None:
    runs = []
    for transport in transports:
        run = Soak(device, transport).run(exchanges)
        total = torch.tensor(run["wrong_words"], device=device)
        dist.all_reduce(total)
        runs.append({**run, "wrong_words": int(total)})
    if dist.get_rank() == 0:
        result = {
            "experiment": "soak",
            "where": environment.describe(device, dist.get_world_size()),
            "runs": runs,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
        Console().print(runs)


if __name__ == "__main__":
    typer.run(main)
