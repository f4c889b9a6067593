"""What do the rolls of one microbatch cost the host and the GPU, by schedule, transport, depths and documents?

    python experiments/roll_latency.py --out experiments/results/rolls_alone/2xH200
    python experiments/roll_latency.py --device cpu --tokens 64 --documents 1,8 --rounds 5

Times the rolls alone, without a model: four tensors of batch size 1, in interleaved rounds in random order, with a new
packing each. Host time is the time inside `start` and all `at`: directly after another method, on cold caches
(`cold_us`), and once more after that (`host_us`). Wall time is from an idle device to an idle device and includes plan
and upload of the packing. GPU time is that of a CUDA graph of the same calls. If megatron-core is installed
(`pip install --no-deps megatron-core`), its `roll_tensor` runs in the same rounds. Writes `roll_latency.json` and a
picture into `--out`.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from harness import environment
from harness.command import (
    Numbers,
    TransportOptions,
    Words,
    check_among,
    check_least,
    check_out,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from harness.rounds import interleaved, rank_console, synchronize, with_progress
from latency import megatron_rolls, report
from latency.candidate import EXCHANGING, MEGATRON, Candidate, Method
from latency.cases import Case, Workload, new_layout
from overlap_mtp import SCHEDULES

ALL_SCHEDULES = (*SCHEDULES, MEGATRON)


@dataclass(frozen=True)
class Options:
    """What to time: every combination of depths and documents."""

    depths: Numbers = (1, 2, 8)
    """Numbers of depths."""
    documents: Numbers = (1, 8, 32, 128)
    """Numbers of documents; 1 is a dense sequence."""
    tokens: int = 4096
    """Tokens of a rank."""
    schedules: Words = ALL_SCHEDULES
    """Schedules, or megatron."""
    rounds: int = 30
    """Timed rounds."""
    out: Path = Path("out/latency")
    """Folder for the record and the picture."""
    where: TransportOptions = field(default_factory=TransportOptions)

    def workloads(self, ranks: int) -> list[Workload]:
        """Return all workloads to time. All ranks share a sequence."""
        return [Workload(ranks, depths, one, self.tokens) for depths in self.depths for one in self.documents]

    def methods(self, documents: int, transports: tuple[str, ...]) -> list[Method]:
        """Return who rolls. Megatron-LM's dense rolls have no cu_seqlens, so that there is one form of them.

        Args:
            documents: of the workload; 1 is a dense sequence.
            transports: of the schedules that have a choice.
        """
        choices = dict.fromkeys(EXCHANGING, transports)
        choices[MEGATRON] = megatron_rolls.CU_SEQLENS_ON[: 1 if documents == 1 else 2]
        return [Method(one, choice) for one in self.schedules for choice in choices.get(one, ("",))]

    def check(self) -> None:
        """Raise ValueError for what no rank could run."""
        check_least(self, tokens=2, rounds=2)
        check_among(self, schedules=ALL_SCHEDULES)
        self.where.check()
        for workload in self.workloads(self.where.count):
            new_layout(workload, seed=0)


def time_on_rank(device: torch.device, options: Options) -> None:
    """Run one rank; rank 0 shows progress, prints the table and writes the record."""
    console, version = rank_console(), megatron_rolls.version()
    rows = _measure(device, options, version is not None, console)
    gc.collect()  # the process group ends after what holds its communicators and memory
    synchronize(device)
    if rows is None:
        return
    if MEGATRON in options.schedules and version is None:
        console.print("skipped: megatron (install megatron-core to time it)")
    record = {
        "experiment": "roll_latency",
        "where": environment.describe(device, dist.get_world_size()),
        "megatron_core": version,
        "settings": {name: one for name, one in asdict(options).items() if name not in ("out", "where")},
        "rows": rows,
    }
    path = write_record(record, options.out / "roll_latency.json")
    report.draw(record, path.with_suffix(".png"))
    console.print(report.table_of(record))
    console.print(f"wrote {path}, {path.with_suffix('.png')}", soft_wrap=True)


def _measure(
    device: torch.device, options: Options, has_megatron: bool, console: Console
) -> list[report.Row] | None:
    """Time every method at every workload; return their rows on rank 0."""
    group = dist.group.WORLD
    assert group is not None
    cases = [Case(workload, group, device) for workload in options.workloads(group.size())]
    candidates = [
        Candidate(case, method)
        for case in cases
        for method in options.methods(case.workload.documents, options.where.chosen)
        if has_megatron or method.schedule != MEGATRON
    ]
    for candidate in with_progress(candidates, "first rolls", console):
        candidate.warm_up()
    for _, order in interleaved(candidates, options.rounds, 0, "rounds", console):
        for candidate in order:
            candidate.time()
    if device.type == "cuda":
        captured = [one for one in candidates if one.method.schedule in EXCHANGING]
        for candidate in with_progress(captured, "graphs", console):
            candidate.time_graph()
    rows = report.rows_of(candidates)
    for candidate in candidates:
        candidate.roller.close()
    return rows


def main() -> None:
    options = parse_options(Options, "Time one microbatch's rolls under every schedule and transport.")
    with usage_errors():
        options.check()
        check_out(options.out, "roll_latency.json", "roll_latency.png")
    run_on_ranks(time_on_rank, options.where.ranks, options.where.device, options)


if __name__ == "__main__":
    main()
