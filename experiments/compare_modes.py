"""What does the boundary exchange cost under each schedule, and do all schedules compute the same?

    make compare                                                  (two CPU ranks, or all GPUs)
    python experiments/compare_modes.py --preset h4096 --documents 32
    torchrun --nproc-per-node 8 experiments/compare_modes.py --preset h4096

Every round runs one step of each schedule on the same weights and batch, then one update. A step is forward and
backward, without optimizer and gradient reduction; it builds and uploads the plan of its batch. Prints a table and what
it says in one sentence; writes `results.json`, two pictures and a page, `report.html`, into `--out`. Exits with 1
if bits are wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch

from compare.comparison import Comparison, Problem, Settings, Timing, open_stream
from compare.report import publish
from compare.sentence import wrong_bits
from harness.activation_options import ActivationOptions
from harness.command import (
    RankOptions,
    Ranks,
    SmallSize,
    check_least,
    check_out,
    default_is,
    exit_with_1_if,
    parse_options,
    usage_errors,
)
from harness.launch import run_on_ranks
from harness.rounds import rank_console
from overlap_mtp.model.config import PRESETS

ABOUT = """Compare the schedules in interleaved training steps on real text.

The table has a row for each schedule: its step time, the ratio to the step of `prepared`, whose loader has rolled the \
batch so that nothing is sent, the stall (how long rolls held up the compute stream), the messages of all ranks, and \
whether rolls, loss and (on CPU ranks) gradients have the same bits as those of `prepared`. Intervals are 95 % over \
rounds. `none` does not roll at all: its tokens are wrong, and its time shows what a step without any exchange takes.

If the model rolls activations (--mtp-inputs embeddings, --hidden-state-mixing, --distillation tv), schedules of \
these are compared: with the step of `none`, and with the bits of `merged`. Tokens are prepared."""
OfPreset = Annotated[int | None, default_is("the preset's")]


@dataclass(frozen=True)
class ModelOptions:
    """Values that replace those of the preset."""

    num_depths: Annotated[int | None, default_is("the preset's", name="depths")] = None
    """MTP layers, which are the depths to roll to."""
    hidden_size: OfPreset = None
    """Width of the hidden states."""
    num_layers: OfPreset = None
    """Layers of the trunk."""
    num_heads: OfPreset = None
    """Attention heads of a layer."""
    num_kv_heads: OfPreset = None
    """Key and value heads of a layer."""
    ffn_size: OfPreset = None
    """Width inside of a feed-forward layer."""
    vocab_size: OfPreset = None
    """Token ids that the model knows."""


@dataclass(frozen=True)
class Options:
    """One comparison."""

    preset: str = "h2048"
    """The model's size: tiny, small, h2048 or h4096."""
    seq_len: Annotated[int | None, default_is("the preset's tokens a rank, times the ranks")] = None
    """Tokens of the whole sequence, over all ranks."""
    batch_size: OfPreset = None
    """Sequences in a batch."""
    documents: int = 8
    """Documents packed into a sequence; 0: one dense stream."""
    forward_only: bool = False
    """No backward pass and no update."""
    out: Path = Path("out/compare")
    """Folder for the record, the pictures and the page."""
    wide: bool = False
    """Print all columns of the table."""
    model: ModelOptions = field(default_factory=ModelOptions)
    activation: ActivationOptions = field(default_factory=ActivationOptions)
    settings: Timing = field(default_factory=Settings)
    where: Ranks = field(default_factory=RankOptions)

    def problem(self) -> Problem:
        """Return what the steps compute, checked before any rank starts. Raises ValueError if it is illegal."""
        check_least(self, seq_len=1, batch_size=1, documents=0)
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        chosen, ranks = PRESETS[self.preset], self.where.count
        given = {name: value for name, value in asdict(self.model).items() if value is not None}
        problem = Problem(
            replace(chosen.model, **given, **asdict(self.activation)),
            self.seq_len or chosen.tokens_per_rank * ranks,
            self.batch_size or chosen.batch_size,
            self.documents or None,
            self.forward_only,
        )
        self.settings.check(problem, self.where.on_gpu)
        open_stream(problem, self.settings, ranks).batch(0)
        return problem


ON_CPU = SmallSize(Options(preset="tiny"), "60 s", "--preset h2048", "a day")


def compare_on_rank(
    device: torch.device, problem: Problem, settings: Settings, out: Path, wide: bool
) -> None:
    """Run one rank of the comparison; rank 0 shows progress, writes the record and prints what it says."""
    console = rank_console()
    result = Comparison(problem, settings, device).run(console)
    if result is not None:
        publish(result, out / "results.json", "", console, wide)


def main() -> None:
    options = parse_options(Options, ABOUT, on_cpu=ON_CPU.options)
    with usage_errors():
        problem, where = options.problem(), options.where
        check_out(options.out, "results.json", "step_time.png", "step_delta.png", "report.html")
        options.settings.check_profile_out()
    ON_CPU.say(options)
    arguments = problem, options.settings, options.out, options.wide
    run_on_ranks(compare_on_rank, where.ranks, where.device, *arguments)
    exit_with_1_if(wrong_bits, options.out / "results.json")


if __name__ == "__main__":
    main()
