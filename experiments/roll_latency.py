"""What do the rolls of one microbatch cost the host and the GPU, by schedule, transport, depths and documents?

    python experiments/roll_latency.py --out experiments/results/2xH200
    torchrun --nproc-per-node 4 experiments/roll_latency.py --cp-sizes 4,2
    python experiments/roll_latency.py --device cpu --tokens 64 --documents 1,8 --rounds 5

Rolls isolated, without a model: four tensors of batch size 1, in interleaved rounds in random order, a new packing
each. Host time is that inside `start` and all `at`, in a row of repetitions (`host_us`) and at once behind another
configuration, on cold caches (`cold_us`); wall time is from an idle device to an idle device, plan and
upload of the packing included; GPU time is that of a CUDA graph of the same calls. Where megatron-core is installed
(`pip install --no-deps megatron-core`), its `roll_tensor` runs in the same rounds. Writes `roll_latency.json` and a
picture into `--out`.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness import environment
from harness.launch import run_on_ranks
from latency import megatron_rolls, report
from latency.bench import Bench
from latency.cases import EXCHANGING, MEGATRON, Configuration, Method, Workload, new_layout
from overlap_mtp import SCHEDULES, SequenceLayout, make_roller

WAYS = (*SCHEDULES, MEGATRON)
BASE_DEPTHS, BASE_DOCUMENTS, MANY_DOCUMENTS = 2, 8, 32


@dataclass(frozen=True)
class Settings:
    """What to time. `cp_sizes` empty: all ranks, and pairs of them where there are four or more."""

    depths: tuple[int, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    cp_sizes: tuple[int, ...]
    schedules: tuple[str, ...]
    transports: tuple[str, ...]
    cross: bool
    rounds: int
    slow_seconds: float
    replays: int


def main(
    depths: Annotated[str, typer.Option(help="Comma-separated numbers of depths.")] = "1,2,4,8",
    documents: Annotated[str, typer.Option(help="Comma-separated; 1 is a dense sequence.")] = "1,8,32,128",
    tokens: Annotated[str, typer.Option(help="Comma-separated tokens of a rank.")] = "4096,8192",
    cp_sizes: Annotated[
        str, typer.Option(help="Comma-separated; default: all ranks, and pairs where there are 4 or more.")
    ] = "",
    schedules: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(WAYS),
    transports: Annotated[str, typer.Option(help="Comma-separated.")] = "process_group,symmetric",
    cross: Annotated[
        bool, typer.Option("--cross", help="Every combination, not lines through one workload.")
    ] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: all GPUs, else 2 CPU ranks.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 60,
    slow_seconds: Annotated[
        float, typer.Option(min=0, help="A slow configuration runs in fewer rounds, for about so long.")
    ] = 0.6,
    replays: Annotated[int, typer.Option(min=1, help="Of a CUDA graph, back to back.")] = 200,
    out: Annotated[Path, typer.Option(help="Where the record and the picture go.")] = Path("out/latency"),
) -> None:
    """Times one microbatch's rolls under every schedule and transport."""
    try:
        settings = Settings(
            _numbers(depths, "depths"),
            _numbers(documents, "documents"),
            _numbers(tokens, "tokens"),
            _numbers(cp_sizes, "cp-sizes") if cp_sizes else (),
            tuple(schedules.split(",")),
            tuple(transports.split(",")),
            cross,
            rounds,
            slow_seconds,
            replays,
        )
        on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
        here = torch.cuda.device_count() if on_gpu else 2
        check(settings, int(os.environ.get("WORLD_SIZE", 0)) or ranks or here)
        run_on_ranks(time_on_rank, ranks, device, settings, out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _numbers(text: str, name: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name} must be comma-separated whole numbers above 0, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def check(settings: Settings, world: int) -> None:
    """Raises ValueError for what no rank could run."""
    unknown = [one for one in settings.schedules if one not in WAYS]
    if unknown:
        raise ValueError(f"schedules must be among {', '.join(WAYS)}, got {unknown[0]!r}")
    for size in settings.cp_sizes:
        if world % size:
            raise ValueError(f"cp-sizes must divide the number of ranks {world}, got {size}")
    for workload in workloads_of(settings, world):
        new_layout(workload, (0,))


def lines_through(settings: Settings, cp_size: int) -> dict[str, list[Workload]]:
    """Points by line: each line varies one thing and holds the others at the base workload."""
    depths = _nearest(BASE_DEPTHS, settings.depths)
    tokens = settings.tokens[0]
    many = _nearest(MANY_DOCUMENTS, settings.documents)
    lines = {
        f"documents, D = {depths}": [Workload(cp_size, depths, n, tokens) for n in settings.documents],
        "depths, dense": [
            Workload(cp_size, d, 1, tokens) for d in settings.depths if 1 in settings.documents
        ],
        f"depths, {many} documents": [
            Workload(cp_size, d, many, tokens) for d in settings.depths if many > 1
        ],
        "tokens": [
            Workload(cp_size, depths, _nearest(BASE_DOCUMENTS, settings.documents), t)
            for t in settings.tokens
        ],
    }
    return {name: line for name, line in lines.items() if len(line) > 1 or name.startswith("documents")}


def _nearest(wanted: int, among: tuple[int, ...]) -> int:
    return min(among, key=lambda one: abs(one - wanted))


def workloads_of(settings: Settings, world: int) -> list[Workload]:
    """All workloads to time: the lines (documents only on a part of the ranks), or every combination."""
    sizes = settings.cp_sizes or ((world, 2) if world >= 4 and world % 2 == 0 else (world,))
    workloads: list[Workload] = []
    for size in sizes:
        if settings.cross:
            every = product(settings.depths, settings.documents, settings.tokens)
            workloads += [Workload(size, *one) for one in every]
        else:
            lines = list(lines_through(settings, size).values())
            workloads += [
                workload for line in (lines if size == sizes[0] else lines[:1]) for workload in line
            ]
    return list(dict.fromkeys(workloads))


def methods_for(workload: Workload, settings: Settings, missing: dict[str, str]) -> list[Method]:
    """Who rolls at a workload. `missing`: transports and schedules that are not there."""
    methods: list[Method] = []
    for schedule in settings.schedules:
        if schedule == MEGATRON:  # a dense roll has no cu_seqlens
            places = megatron_rolls.WHERE[:1] if workload.documents == 1 else megatron_rolls.WHERE
            methods += [Method(schedule, where) for where in places if schedule not in missing]
        elif schedule in EXCHANGING:
            methods += [Method(schedule, one) for one in settings.transports if one not in missing]
        else:
            methods.append(Method(schedule))
    return methods


def find_missing(
    settings: Settings, device: torch.device, console: Console
) -> tuple[dict[str, str], str | None]:
    """What cannot run here and why, and the version of megatron-core."""
    missing: dict[str, str] = {}
    version = None
    layout = SequenceLayout.dense(2 * dist.get_world_size(), dist.get_world_size())
    tokens = torch.ones(1, layout.local_len, dtype=torch.int64, device=device)
    for transport in settings.transports:
        try:  # one that cannot work here says so on all ranks, when it is made or at its first roll
            roller = make_roller("prefetch", dist.group.WORLD, 1, transport=transport)
            roller.start({"input_ids": tokens}, layout).at(1)
            roller.close()
        except ValueError as error:
            missing[transport] = str(error)
    if MEGATRON in settings.schedules:
        try:
            version = megatron_rolls.version()
        except ImportError as error:
            missing[MEGATRON] = str(error)
    for name, why in missing.items():
        console.print(f"skipped: {name} ({why})", markup=False)
    return missing, version


def time_on_rank(device: torch.device, settings: Settings, out: Path) -> None:
    """One rank; rank 0 shows progress, prints the tables and writes the record."""
    console = Console(quiet=dist.get_rank() != 0, width=report.WIDTH)
    missing, version = find_missing(settings, device, console)
    workloads = workloads_of(settings, dist.get_world_size())
    configurations = [
        Configuration(workload, method)
        for workload in workloads
        for method in methods_for(workload, settings, missing)
    ]
    bench = Bench(configurations, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:

        def counter(what: str, total: int) -> Any:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        bench.prepare(settings.rounds, settings.slow_seconds, counter("first rolls", len(configurations)))
        bench.run(settings.rounds, counter("rounds", settings.rounds))
        if device.type == "cuda":
            bench.graphs(settings.replays, 7, counter("graphs", len(configurations)))
    rows = report.rows_of(bench.candidates)
    bench.close()
    del bench
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    if rows is None:
        return
    result = {
        "experiment": "roll_latency",
        "where": environment.describe(device, dist.get_world_size()),
        "megatron_core": version,
        "skipped": missing,
        "settings": asdict(settings),
        "rows": rows,
    }
    lines = lines_through(settings, workloads[0].cp_size)
    for size in dict.fromkeys(
        workload.cp_size for workload in workloads[1:] if workload.cp_size != workloads[0].cp_size
    ):
        name, line = next(iter(lines_through(settings, size).items()))
        lines[f"cp_size {size}: {name}"] = line
    out.mkdir(parents=True, exist_ok=True)
    (out / "roll_latency.json").write_text(json.dumps(result, indent=1) + "\n")
    picture = report.draw(result, lines, out / "roll_latency.png")
    for table in report.tables_of(result, lines):
        console.print(table)
    console.print(f"wrote {out / 'roll_latency.json'}, {picture}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
