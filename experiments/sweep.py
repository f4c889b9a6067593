"""What does each schedule cost across presets, kinds of documents and directions? Many comparisons in one launch.

    python experiments/sweep.py --out experiments/results/step_time/2xH200/default
    torchrun --nproc-per-node 4 experiments/sweep.py --presets h4096 --documents 0,32 --directions train

Each comparison is one of `compare_modes` and has a record, pictures and a page of its own. `summary.md` has a line for
each schedule of each record in `--out`.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path

import compare_modes
import torch

from compare.comparison import Comparison, Problem, Settings, Timing
from compare.report import markdown_of, publish, read_record
from compare.sentence import wrong_bits
from harness.command import (
    NumbersFrom0,
    RankOptions,
    Ranks,
    SmallSize,
    Words,
    check_among,
    check_out,
    exit_with_1_if,
    parse_options,
    usage_errors,
)
from harness.launch import run_on_ranks
from harness.rounds import rank_console

DIRECTIONS = {"train": False, "forward": True}


@dataclass(frozen=True)
class Options:
    """Many comparisons."""

    presets: Words = ("h2048", "h4096")
    """The model's sizes: tiny, small, h2048, h4096."""
    documents: NumbersFrom0 = (0, 8, 32)
    """Documents packed into a sequence; 0: one dense stream."""
    directions: Words = ("train", "forward")
    """train (forward and backward), forward."""
    out: Path = Path("out/sweep")
    """Folder for the records, the pictures and the summary."""
    settings: Timing = field(default_factory=lambda: Settings(rounds=60))
    where: Ranks = field(default_factory=RankOptions)

    def problems(self) -> dict[str, Problem]:
        """Return what to compare, by name. Raises ValueError for anything illegal."""
        check_among(self, directions=DIRECTIONS)
        comparisons = len(self.presets) * len(self.documents) * len(self.directions)
        if self.settings.profile == "nsys" and comparisons > 1:
            raise ValueError(
                f"--profile nsys records one comparison, got {comparisons}: give one value each to --presets, "
                "--documents and --directions, or take --profile torch"
            )
        suffix = ("-compile" if self.settings.compiled else "") + ("-graph" if self.settings.captured else "")
        return {
            f"{preset}-{documents or 'dense'}-{direction}{suffix}": self._problem(
                preset, documents, direction
            )
            for preset in self.presets
            for documents in self.documents
            for direction in self.directions
        }

    def _problem(self, preset: str, documents: int, direction: str) -> Problem:
        one = compare_modes.Options(preset, settings=self.settings, where=self.where)
        return replace(one, documents=documents, forward_only=DIRECTIONS[direction]).problem()


ON_CPU = SmallSize(
    Options(("tiny",), (0, 8), ("train",), settings=Settings(rounds=10, warmup=2)),
    "40 s",
    "--presets h2048,h4096 --documents 0,8,32 --directions train,forward --rounds 60 --warmup 5",
    "weeks",
)


def sweep_on_rank(device: torch.device, problems: dict[str, Problem], settings: Settings, out: Path) -> None:
    """Run one rank of all comparisons; rank 0 writes the records, pictures and summary."""
    console = rank_console()
    for name, problem in problems.items():
        own = replace(settings, profile_out=settings.profile_out / name)
        result = Comparison(problem, own, device).run(console)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if result is not None:
            publish(result, out / f"{name}.json", f"{name}-", console)
            write_summary(out)


def write_summary(folder: Path) -> None:
    """Write `summary.md`: a table of all records of comparisons in the folder.

    Raises:
        ValueError: naming a file that is no JSON, or that says to be such a record and is not.
    """
    compared = {}
    for path in sorted(folder.glob("*.json")):
        if (record := read_record(path)) is not None:
            compared[path.stem] = record
    (folder / "summary.md").write_text(markdown_of(compared))


def main() -> None:
    options = parse_options(
        Options, "Compare the schedules in every combination of the options.", ON_CPU.options
    )
    with usage_errors():
        problems, where = options.problems(), options.where
        check_out(options.out, "summary.md", *(f"{name}.json" for name in problems))
        options.settings.check_profile_out()
        write_summary(options.out)  # reads what is there already
    ON_CPU.say(options)
    run_on_ranks(sweep_on_rank, where.ranks, where.device, problems, options.settings, options.out)
    exit_with_1_if(wrong_bits, *(options.out / f"{name}.json" for name in problems))


if __name__ == "__main__":
    main()
