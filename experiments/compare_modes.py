"""What does the boundary exchange cost under each schedule, and do all schedules compute the same?

    make compare                                                  (two CPU ranks, or all GPUs)
    python experiments/compare_modes.py --preset h4096 --num-documents 32
    torchrun --nproc-per-node 8 experiments/compare_modes.py --preset h4096

Every round runs one step of each schedule on the same weights and batch, then one update. A step is forward and
backward, without optimizer and gradient reduction; it builds and uploads the plan of its batch. Prints a table and what
it says in one sentence; writes `results.json`, two pictures and a page, `report.html`, into `--out`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from compare.comparison import Comparison, Problem, Settings, open_stream
from compare.report import publish
from harness.command import RankOptions, check_least, check_out, parse_options, usage_errors
from harness.launch import run_on_ranks
from harness.rounds import rank_console
from overlap_mtp.model.config import PRESETS


@dataclass(frozen=True)
class ModelOptions:
    """Values that replace those of the preset."""

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
    documents: Literal["dense", "packed"] = "packed"
    """Whether a sequence is one stream of text or packed documents."""
    num_documents: int = 8
    """Documents in a packed sequence."""
    forward_only: bool = False
    """No backward pass and no update."""
    out: Path = Path("out/compare")
    """Folder for the record, the pictures and the page."""
    wide: bool = False
    """Print all columns of the table."""
    model: ModelOptions = field(default_factory=ModelOptions)
    settings: Settings = field(default_factory=Settings)
    where: RankOptions = field(default_factory=RankOptions)

    def problem(self) -> Problem:
        """Return what the steps compute, checked before any rank starts. Raises ValueError if it is illegal."""
        check_least(self, seq_len=1, batch_size=1, num_documents=1)
        name = self.preset or ("h2048" if self.where.on_gpu else "tiny")
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        chosen, ranks = PRESETS[name], self.where.count
        problem = Problem(
            replace(chosen.model, **{name: n for name, n in asdict(self.model).items() if n is not None}),
            self.seq_len or chosen.tokens_per_rank * ranks,
            self.batch_size or chosen.batch_size,
            self.num_documents if self.documents == "packed" else None,
            self.forward_only,
        )
        self.settings.check(problem, self.where.on_gpu)
        open_stream(problem, self.settings, ranks).batch(0)
        return problem


def compare_on_rank(
    device: torch.device, problem: Problem, settings: Settings, out: Path, wide: bool
) -> None:
    """Run one rank of the comparison; rank 0 shows progress, writes the record and prints what it says."""
    console = rank_console()
    result = Comparison(problem, settings, device).run(console)
    if result is not None:
        publish(result, out / "results.json", "", console, wide)


def main() -> None:
    options = parse_options(Options, "Compare the schedules in interleaved training steps on real text.")
    with usage_errors():
        problem, where = options.problem(), options.where
        check_out(options.out, "results.json", "step_time.png", "step_delta.png", "report.html")
        options.settings.check_profile_out()
    arguments = problem, options.settings, options.out, options.wide
    run_on_ranks(compare_on_rank, where.ranks, where.device, *arguments)


if __name__ == "__main__":
    main()
