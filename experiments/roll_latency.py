"""What do the rolls of one microbatch cost the host and the GPU, by schedule, transport, depths and documents?

    python experiments/roll_latency.py --out experiments/results/rolls_alone/2xH200
    torchrun --nproc-per-node 4 experiments/roll_latency.py --cp-sizes 4,2
    python experiments/roll_latency.py --device cpu --tokens 64 --documents 1,8 --rounds 5

Times the rolls alone, without a model: four tensors of batch size 1, in interleaved rounds in random order, with a new
packing each. Host time is the time inside `start` and all `at`: in a row of repetitions (`host_us`), and directly after
another configuration, on cold caches (`cold_us`). Wall time is from an idle device to an idle device and includes plan
and upload of the packing. GPU time is that of a CUDA graph of the same calls. If megatron-core is installed
(`pip install --no-deps megatron-core`), its `roll_tensor` runs in the same rounds. Writes `roll_latency.json` and a
picture into `--out`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness import environment
from harness.command import (
    Numbers,
    RankOptions,
    Words,
    check_least,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from latency import megatron_rolls, report
from latency.bench import Bench
from latency.cases import EXCHANGING, MEGATRON, Configuration, Method, Workload, new_layout
from overlap_mtp import SCHEDULES, SequenceLayout, make_roller

ALL_SCHEDULES = (*SCHEDULES, MEGATRON)
BASE_DEPTHS, BASE_DOCUMENTS, MANY_DOCUMENTS = 2, 8, 32
GRAPH_REPEATS = 7


@dataclass(frozen=True)
class Options:
    """What to time."""

    depths: Numbers = (1, 2, 4, 8)
    """Numbers of depths."""
    documents: Numbers = (1, 8, 32, 128)
    """Numbers of documents; 1 is a dense sequence."""
    tokens: Numbers = (4096, 8192)
    """Tokens of a rank."""
    cp_sizes: Numbers | None = None
    """Ranks that share a sequence; by default all, and pairs of them if there are 4 or more."""
    schedules: Words = ALL_SCHEDULES
    """Schedules, or megatron."""
    transports: Words = ("process_group", "symmetric")
    """Transports of the schedules that have a choice."""
    cross: bool = False
    """Time every combination, instead of lines through one workload."""
    rounds: int = 60
    """Timed rounds."""
    slow_seconds: float = 0.6
    """A slow configuration runs in fewer rounds, for about this long."""
    replays: int = 200
    """Replays of a CUDA graph, back to back."""
    out: Path = Path("out/latency")
    """Folder for the record and the picture."""
    where: RankOptions = field(default_factory=RankOptions)

    def check(self) -> None:
        """Raise ValueError for what no rank could run."""
        check_least(self, rounds=2, slow_seconds=0, replays=1)
        ranks = self.where.count
        unknown = [one for one in self.schedules if one not in ALL_SCHEDULES]
        if unknown:
            raise ValueError(f"schedules must be among {', '.join(ALL_SCHEDULES)}, got {unknown[0]!r}")
        for size in self.cp_sizes or ():
            if ranks % size:
                raise ValueError(f"cp-sizes must divide the number of ranks {ranks}, got {size}")
        for workload in workloads_of(self, ranks):
            new_layout(workload, (0,))


def lines_through(options: Options, cp_size: int) -> dict[str, list[Workload]]:
    """Return workloads by line: each line varies one size and keeps the others at those of the base workload.

    Args:
        options: the sizes to vary over.
        cp_size: of all workloads.
    """
    depths = _nearest(BASE_DEPTHS, options.depths)
    documents = _nearest(BASE_DOCUMENTS, options.documents)
    many = _nearest(MANY_DOCUMENTS, options.documents)
    tokens = options.tokens[0]
    lines = {f"documents, D = {depths}": [Workload(cp_size, depths, n, tokens) for n in options.documents]}
    if 1 in options.documents:
        lines["depths, dense"] = [Workload(cp_size, d, 1, tokens) for d in options.depths]
    if many > 1:
        lines[f"depths, {many} documents"] = [Workload(cp_size, d, many, tokens) for d in options.depths]
    lines["tokens"] = [Workload(cp_size, depths, documents, t) for t in options.tokens]
    return {name: line for name, line in lines.items() if len(line) > 1 or name.startswith("documents")}


def _nearest(wanted: int, among: tuple[int, ...]) -> int:
    return min(among, key=lambda one: abs(one - wanted))


def all_lines(options: Options, ranks: int) -> dict[str, list[Workload]]:
    """Return the lines of all cp sizes. Sizes after the first have the line of documents only."""
    first, *rest = options.cp_sizes or ((ranks, 2) if ranks >= 4 and ranks % 2 == 0 else (ranks,))
    lines = lines_through(options, first)
    for size in rest:
        name, line = next(iter(lines_through(options, size).items()))
        lines[f"cp_size {size}: {name}"] = line
    return lines


def workloads_of(options: Options, ranks: int) -> list[Workload]:
    """Return all workloads to time: those of the lines, or every combination."""
    workloads = [workload for line in all_lines(options, ranks).values() for workload in line]
    if options.cross:
        sizes = dict.fromkeys(workload.cp_size for workload in workloads)
        every = product(sizes, options.depths, options.documents, options.tokens)
        workloads = [Workload(*one) for one in every]
    return list(dict.fromkeys(workloads))


def methods_for(workload: Workload, options: Options, missing: dict[str, str]) -> list[Method]:
    """Return who rolls at a workload.

    Args:
        workload: if it is dense, Megatron-LM's rolls have no cu_seqlens, so that there is one form of them.
        options: the schedules and transports.
        missing: the transports and schedules that do not work here.
    """
    choices = dict.fromkeys(EXCHANGING, options.transports)
    choices[MEGATRON] = megatron_rolls.CU_SEQLENS_ON[: 1 if workload.documents == 1 else 2]
    return [
        Method(schedule, choice)
        for schedule in options.schedules
        for choice in choices.get(schedule, ("",))
        if schedule not in missing and choice not in missing
    ]


def find_missing(
    options: Options, device: torch.device, console: Console
) -> tuple[dict[str, str], str | None]:
    """Try transports and Megatron-LM.

    Returns:
        What does not work here, by name, with the reason; and the version of megatron-core.
    """
    missing: dict[str, str] = {}
    version = None
    layout = SequenceLayout.dense(2 * dist.get_world_size(), dist.get_world_size())
    tokens = torch.ones(1, layout.local_len, dtype=torch.int64, device=device)
    for transport in options.transports:
        try:  # a transport that cannot work here raises on all ranks, when it is made or at its first roll
            roller = make_roller("prefetch", dist.group.WORLD, 1, transport=transport)
            roller.start({"input_ids": tokens}, layout).at(1)
            roller.close()
        except ValueError as error:
            missing[transport] = str(error)
    if MEGATRON in options.schedules:
        try:
            version = megatron_rolls.version()
        except ImportError as error:
            missing[MEGATRON] = str(error)
    for name, why in missing.items():
        console.print(f"skipped: {name} ({why})", markup=False)
    return missing, version


def time_on_rank(device: torch.device, options: Options) -> None:
    """Run one rank; rank 0 shows progress, prints the tables and writes the record."""
    console = Console(quiet=dist.get_rank() != 0, width=report.WIDTH)
    missing, version = find_missing(options, device, console)
    configurations = [
        Configuration(workload, method)
        for workload in workloads_of(options, dist.get_world_size())
        for method in methods_for(workload, options, missing)
    ]
    rows = measure(configurations, device, options, console)
    if rows is None:
        return
    settings = {**asdict(options), "out": None, "where": None}
    result = {
        "experiment": "roll_latency",
        "where": environment.describe(device, dist.get_world_size()),
        "megatron_core": version,
        "skipped": missing,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "rows": rows,
    }
    path = write_record(result, options.out / "roll_latency.json")
    lines = all_lines(options, dist.get_world_size())
    report.draw(result, lines, path.with_suffix(".png"))
    for table in report.tables_of(result, lines):
        console.print(table)
    console.print(f"wrote {path}, {path.with_suffix('.png')}", soft_wrap=True)


def measure(
    configurations: list[Configuration], device: torch.device, options: Options, console: Console
) -> list[report.Row] | None:
    """Time all configurations; return their rows on rank 0. Collective."""
    bench = Bench(configurations, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:

        def counter(what: str, total: int) -> Callable[[], Any]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        bench.prepare(options.rounds, options.slow_seconds, counter("first rolls", len(configurations)))
        bench.run(options.rounds, counter("rounds", options.rounds))
        if device.type == "cuda":
            bench.graphs(options.replays, GRAPH_REPEATS, counter("graphs", len(configurations)))
    rows = report.rows_of(bench.candidates)
    bench.close()
    del bench
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return rows


def main() -> None:
    options = parse_options(Options, "Time one microbatch's rolls under every schedule and transport.")
    with usage_errors():
        options.check()
        run_on_ranks(time_on_rank, options.where.ranks, options.where.device, options)


if __name__ == "__main__":
    main()
