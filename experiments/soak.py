"""Does a bit ever go wrong? Many exchanges, several in flight, every stream and rank delayed at random.

    python experiments/soak.py --exchanges 100000 --out experiments/results/rolls_alone/2xH200
    python experiments/soak.py --device cpu --exchanges 200 --activations 200

Starts up to six microbatches, each with a new layout, and joins them in another order; some are dropped. Compares all
rolls with those made from the full batch, and of activations their gradients, too. A third has few documents, a third
has many, in messages of several parts, and a third has contiguous layouts, whose messages go one way: a rank runs ahead
until acknowledgements are missing. Writes `soak.json` into `--out`; exits with 1 if a bit was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from harness import environment
from harness.command import (
    RanksAndTransports,
    SmallSize,
    TransportOptions,
    check_least,
    check_out,
    exit_with_1_if,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from harness.rounds import rank_console
from soaks.activations import ActivationSoak
from soaks.load import Soak
from soaks.tokens import TokenSoak


@dataclass(frozen=True)
class Options:
    """How long to run."""

    exchanges: int = 100_000
    """Exchanges of tokens over each transport."""
    activations: int = 10_000
    """Exchanges of activations over each transport; a backward counts as one."""
    out: Path = Path("out/soak")
    """Folder for the record."""
    where: RanksAndTransports = field(default_factory=TransportOptions)


ON_CPU = SmallSize(
    Options(exchanges=10_000, activations=1_000),
    "40 s",
    "--exchanges 100000 --activations 10000",
    "5 min",
)


def soak_on_rank(
    device: torch.device, exchanges: dict[type[Soak], int], transports: tuple[str, ...], out: Path
) -> None:
    """Run one rank; rank 0 writes the record."""
    console, group = rank_console(), dist.group.WORLD
    assert group is not None
    runs = [
        kind(group, device, transport).run(number, console)
        for kind, number in exchanges.items()
        if number
        for transport in transports
    ]
    if group.rank() == 0:
        where = environment.describe(device, group.size())
        record = {"experiment": "soak", "command": environment.command(), "where": where, "runs": runs}
        write_record(record, out / "soak.json")
        console.print(runs)


def main() -> None:
    options = parse_options(
        Options, "Send many exchanges over each transport and count wrong words.", ON_CPU.options
    )
    with usage_errors():
        check_least(options, exchanges=0, activations=0)
        exchanges = {TokenSoak: options.exchanges, ActivationSoak: options.activations}
        if not any(exchanges.values()):
            raise ValueError("--exchanges and --activations must not both be 0")
        where, out = options.where, options.out
        where.check()
        if where.count < 2:
            raise ValueError(f"a soak needs at least 2 ranks, got {where.count}")
        check_out(out, "soak.json")
    ON_CPU.say(options)
    run_on_ranks(soak_on_rank, where.ranks, where.device, exchanges, where.chosen, out)
    exit_with_1_if(lambda record: any(run["wrong_words"] for run in record["runs"]), out / "soak.json")


if __name__ == "__main__":
    main()
