"""What does the boundary exchange cost under each schedule, and do all schedules compute the same?

    make compare                                                  (two CPU ranks, or all GPUs)
    python experiments/compare_modes.py --preset h4096 --documents packed --num-documents 32
    torchrun --nproc-per-node 8 experiments/compare_modes.py --preset h4096

Every round runs one step of each schedule on the same weights and batch, then one update. A step is forward and
backward, without optimizer and gradient reduction; it builds and uploads the plan of its batch. Writes `results.json`
and two pictures into `--out`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compare.comparison import Comparison, Problem, Settings, open_stream
from compare.report import table_of
from harness import plots
from harness.command import RankOptions, check_least, parse_options, usage_errors, write_record
from harness.launch import run_on_ranks
from overlap_mtp.model.config import PRESETS

WIDTH = 200  # of the table if there is no terminal


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model; by default the preset's."""

    # Overrides the preset.
    num_depths: Annotated[int | None, tyro.conf.arg(name="depths")] = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_size: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Options:
    """One comparison."""

    preset: str | None = None
    """tiny, small, h2048 or h4096; by default tiny on CPU, else h2048."""
    seq_len: int | None = None
    """Tokens of the whole sequence, over all ranks; by default the preset's."""
    batch_size: int | None = None
    """Sequences in a batch; by default the preset's."""
    documents: Literal["dense", "packed"] = "dense"
    """Whether a sequence is one stream of text or packed documents."""
    num_documents: int = 8
    """Documents in a packed sequence."""
    forward_only: bool = False
    """No backward pass and no update."""
    out: Path = Path("out/compare")
    """Folder for the record and the pictures."""
    sizes: ModelSizes = ModelSizes()
    settings: Settings = field(default_factory=Settings)
    where: RankOptions = field(default_factory=RankOptions)

    def problem(self) -> Problem:
        """Return what the steps compute, checked before any rank starts. Raises ValueError if it is illegal."""
        check_least(self, seq_len=1, batch_size=1, num_documents=1)
        name = self.preset or ("h2048" if self.where.on_gpu else "tiny")
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        chosen, ranks = PRESETS[name], self.where.count
        sizes = {key: value for key, value in asdict(self.sizes).items() if value is not None}
        problem = Problem(
            replace(chosen.model, **sizes),
            self.seq_len or chosen.tokens_per_rank * ranks,
            self.batch_size or chosen.batch_size,
            self.num_documents if self.documents == "packed" else None,
            self.forward_only,
        )
        self.settings.check(problem, self.where.on_gpu)
        open_stream(problem, self.settings, ranks).batch(0)
        return problem


def compare_on_rank(device: torch.device, problem: Problem, settings: Settings, out: Path) -> None:
    """Run one rank of the comparison; rank 0 shows progress, prints the table and writes the record."""
    console = Console(quiet=dist.get_rank() != 0, width=None if sys.stdout.isatty() else WIDTH)
    result = run_with_progress(Comparison(problem, settings, device), console)
    if result is not None:
        paths = [write_record(result, out / "results.json"), *plots.draw(result, out)]
        console.print(table_of(result))
        console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)


def run_with_progress(comparison: Comparison, console: Console) -> dict[str, Any] | None:
    """Run all rounds with a progress bar; return the record on rank 0."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        total = comparison.settings.warmup + comparison.settings.rounds
        task = progress.add_task(f"rounds of {', '.join(comparison.steps)}", total=total)
        return comparison.run(lambda: progress.advance(task))


def main() -> None:
    options = parse_options(Options, "Compare the schedules in interleaved training steps on real text.")
    with usage_errors():
        problem, where = options.problem(), options.where
        run_on_ranks(compare_on_rank, where.ranks, where.device, problem, options.settings, options.out)


if __name__ == "__main__":
    main()
