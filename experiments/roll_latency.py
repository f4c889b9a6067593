"""What do the rolls of one microbatch cost the host and the GPU, by schedule, transport, depths and documents?

    python experiments/roll_latency.py --out experiments/results/rolls_alone/2xH200
    python experiments/roll_latency.py --device cpu --seq-len 128 --documents 0,8 --rounds 5

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
from typing import Annotated

import torch
import torch.distributed as dist
from rich.console import Console

from harness import environment
from harness.command import (
    Numbers,
    NumbersFrom0,
    RanksAndTransports,
    SmallSize,
    TransportOptions,
    Words,
    check_among,
    check_least,
    check_out,
    default_is,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from harness.progress import with_progress
from harness.rounds import interleaved, rank_console, synchronize
from latency import megatron_rolls, report
from latency.candidate import MEGATRON, Candidate, Method
from latency.cases import Case, Workload, new_layout
from overlap_mtp import SCHEDULES
from overlap_mtp.schedules.packed import PACKED_SCHEDULES

ALL_MODES = (*SCHEDULES, MEGATRON)
TOKENS_PER_RANK = 4096


@dataclass(frozen=True)
class Options:
    """What to time: every combination of depths and documents."""

    depths: Numbers = (1, 2, 8)
    """Depths to roll to."""
    documents: NumbersFrom0 = (0, 8, 32, 128)
    """Documents packed into a sequence; 0: one dense stream."""
    seq_len: Annotated[int | None, default_is(f"{TOKENS_PER_RANK} for each rank")] = None
    """Tokens of the whole sequence, over all ranks."""
    modes: Words = ALL_MODES
    """Who rolls: schedules, and `megatron`, which is Megatron-LM's own roll_tensor."""
    rounds: int = 30
    """Timed rounds."""
    out: Path = Path("out/latency")
    """Folder for the record and the picture."""
    where: RanksAndTransports = field(default_factory=TransportOptions)

    def workloads(self, ranks: int) -> list[Workload]:
        """Return all workloads to time. All ranks share a sequence."""
        tokens = (self.seq_len or TOKENS_PER_RANK * ranks) // ranks
        return [Workload(ranks, depths, one, tokens) for depths in self.depths for one in self.documents]

    def methods(self, documents: int, transports: tuple[str, ...]) -> list[Method]:
        """Return who rolls. Megatron-LM's dense rolls have no cu_seqlens, so that there is one form of them.

        Args:
            documents: of the workload; 0 is a dense sequence.
            transports: of the schedules that have a choice.
        """
        choices = dict.fromkeys(PACKED_SCHEDULES, transports)
        choices[MEGATRON] = megatron_rolls.CU_SEQLENS_ON[: 2 if documents else 1]
        return [Method(one, choice) for one in self.modes for choice in choices.get(one, ("",))]

    def check(self) -> None:
        """Raise ValueError for what no rank could run."""
        check_least(self, seq_len=2, rounds=2)
        check_among(self, modes=ALL_MODES)
        self.where.check()
        ranks = self.where.count
        if self.seq_len and self.seq_len % (2 * ranks):
            raise ValueError(f"--seq-len must be a multiple of {2 * ranks}, 2 * ranks, got {self.seq_len}")
        for workload in self.workloads(ranks):
            new_layout(workload, seed=0)


ON_CPU = SmallSize(
    Options(depths=(1, 2), documents=(0, 8), rounds=10),
    "40 s",
    "--depths 1,2,8 --documents 0,8,32,128 --rounds 30",
    "15 min",
)


def time_on_rank(device: torch.device, options: Options) -> None:
    """Run one rank; rank 0 shows progress, prints the table and writes the record."""
    console, version = rank_console(), megatron_rolls.version()
    rows = _measure(device, options, version is not None, console)
    gc.collect()  # the process group ends after what holds its communicators and memory
    synchronize(device)
    if rows is None:
        return
    if MEGATRON in options.modes and version is None:
        console.print("skipped: megatron (install megatron-core to time it)")
    record = {
        "experiment": "roll_latency",
        "command": environment.command(),
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
        captured = [one for one in candidates if one.method.schedule in PACKED_SCHEDULES]
        for candidate in with_progress(captured, "graphs", console):
            candidate.time_graph()
    rows = report.rows_of(candidates)
    for candidate in candidates:
        candidate.roller.close()
    return rows


def main() -> None:
    options = parse_options(
        Options, "Time one microbatch's rolls under every schedule and transport.", ON_CPU.options
    )
    with usage_errors():
        options.check()
        check_out(options.out, "roll_latency.json", "roll_latency.png")
    ON_CPU.say(options)
    run_on_ranks(time_on_rank, options.where.ranks, options.where.device, options)


if __name__ == "__main__":
    main()
