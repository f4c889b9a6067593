"""What does a training step of Megatron-LM cost with its own rolls, with the drop-in, and with rolls that send nothing?

    python experiments/megatron_step.py                                        (two CPU ranks, tiny; or all GPUs)
    python experiments/megatron_step.py --preset h4096 --documents 0,8,32,128 --out out/megatron
    torchrun --nproc-per-node 4 experiments/megatron_step.py --preset h2048
    python experiments/megatron_step.py --rounds 0 --train-steps 200 --documents 0,8
    python experiments/megatron_step.py --draw out/a/results.json --draw out/b/results.json       # in one picture

Needs megatron-core, from PyPI or a checkout of Megatron-LM that `--checkout` names, but no Transformer Engine: the core
attention is ours, because Megatron-LM's own needs that package under context parallelism. Everything else of the model
is Megatron-LM's. The modes:

    megatron        Megatron-LM's own rolls, with cu_seqlens on the GPU as pretrain_gpt.py has them
    megatron_host   the same with cu_seqlens in host memory (packed documents only)
    dropin          overlap_mtp.megatron
    dropin_host     the same with cu_seqlens in host memory (packed documents only)
    none            local rolls, which send nothing: wrong tokens, for timing only. All ratios are to this one

Every round runs one step (forward and backward, without optimizer) of each mode in random order, and then in the
reverse of it, on the same weights and batch. Before that, one step of each mode is compared with Megatron-LM's, bit for
bit. Writes `results.json`, `results.md` and `step_time.png` into `--out`. Exit status 1: a bit differs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from tyro.conf import UseAppendAction

from dropin.modes import MODES
from dropin.sizes import Problem, problem_of
from harness.command import (
    NumbersFrom0,
    RankOptions,
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
from harness.rounds import rank_console
from overlap_mtp.megatron.settings import Settings as DropInSettings

if TYPE_CHECKING:
    from dropin.benchmark import Plan

# Before torch starts CUDA. Megatron-LM asks for one connection, its fusions are compiled by torch otherwise, and cuBLAS
# needs a workspace of its own to be deterministic.
VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@dataclass(frozen=True)
class ModelOptions:
    """What a step computes."""

    preset: str = "h4096"
    """The model's size: tiny, h2048 or h4096."""
    documents: NumbersFrom0 = (0, 8, 32)
    """Documents packed into a sequence; 0: one dense stream."""
    depths: int = 2
    """MTP layers, which are the depths to roll to."""
    accumulate: int = 1
    """Microbatches of a rank in a step, back to back."""
    recompute: bool = False
    """Compute each layer's activations again in the backward pass. megatron-core 0.16 cannot do so with documents."""
    tp: int = 1
    """Ranks of a tensor-parallel group; the others are context-parallel."""
    sequence_parallel: bool = False
    """Share the tokens between layers among the tp ranks."""
    checkout: Annotated[Path | None, default_is("the installed megatron-core")] = None
    """Folder with a checkout of Megatron-LM to use."""


@dataclass(frozen=True)
class DropInOptions:
    """The drop-in, overlap_mtp.megatron."""

    schedule: str = "prefetch"
    """When its messages leave: sync, merged, batched, overlap or prefetch."""
    transport: Literal["auto", "process_group", "symmetric"] = "auto"
    """What its messages travel over."""


@dataclass(frozen=True)
class TimingOptions:
    """How the modes are timed."""

    modes: Words = MODES
    """Who rolls: megatron, dropin, and both with cu_seqlens in host memory, which are megatron_host and dropin_host.
    `none` always runs: it sends nothing, and only its time counts."""
    rounds: int = 80
    """Timed rounds; 0: none."""
    warmup: int = 3
    """Rounds before them, which are not timed."""
    limit: float = 60.0
    """Seconds for the rounds of one number of documents: then the rounds end."""
    profile: Annotated[Literal["nsys", "torch"] | None, default_is("no profile")] = None
    """Record the rounds of one number of documents. nsys: start and stop its capture; torch: write traces."""
    profile_out: Path = Path("out/profile")
    """Folder of the traces of --profile torch."""


@dataclass(frozen=True)
class TrainingOptions:
    """Two trainings, with and without the drop-in, whose losses are compared."""

    train_steps: int = 0
    """Optimizer steps of each; 0: no training."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """What updates the weights."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written."""

    out: Path = Path("out/megatron_step")
    """Folder for the record, the table and the picture."""
    draw: UseAppendAction[tuple[Path, ...]] = ()
    """Draw the ratios of this record (results.json) into a picture of all that are given, and time nothing."""


@dataclass(frozen=True)
class Options(ModelOptions, DropInOptions, TimingOptions, TrainingOptions, OutputOptions, RankOptions):
    """One benchmark."""

    def problem(self) -> Problem:
        """Return what the steps compute. Raises ValueError for anything illegal, before any rank starts."""
        check_least(self, rounds=0, warmup=1, limit=0, accumulate=1, depths=1, train_steps=0)
        if self.rounds == 1:
            raise ValueError("--rounds must be 0 or at least 2, got 1")
        check_among(self, modes=MODES)
        DropInSettings(self.schedule, self.transport)  # raises if one is illegal
        if (self.profile or self.transport == "symmetric") and not self.on_gpu:
            raise ValueError("--profile and --transport symmetric need GPUs")
        if self.profile and not self.rounds:
            raise ValueError("--profile records rounds, got --rounds 0")
        if self.profile and len(self.documents) > 1:
            raise ValueError("--profile needs one number of documents, as in --documents 32")
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        problem = problem_of(
            self.preset,
            self.depths,
            self.count,
            self.tp,
            self.sequence_parallel,
            self.recompute,
            dtype,
        )
        for documents in self.documents:
            problem.check_documents(documents)
        find_megatron(self.checkout)
        if self.recompute and any(self.documents) and self.checkout is None and _is_old():
            raise ValueError(
                "--recompute needs --documents 0 with megatron-core 0.16, whose MTP layers cannot recompute "
                "packed documents: or give --checkout"
            )
        return problem

    def plan(self, problem: Problem) -> Plan:
        """Return what a rank runs."""
        from dropin.benchmark import Plan
        from dropin.timing import Rounds

        return Plan(
            problem,
            self.documents,
            self.modes,
            Rounds(self.rounds, self.warmup, self.accumulate, self.limit),
            self.schedule,
            self.transport,
            self.train_steps,
            self.optimizer,
            self.profile,
            self.profile_out,
        )

    def recorded(self, problem: Problem) -> dict[str, Any]:
        """Return the settings for the record, without any path."""
        left_out = ("out", "draw", "profile_out", "ranks", "device")
        return {
            **{name: value for name, value in asdict(self).items() if name not in left_out},
            "checkout": self.checkout is not None,
            "tokens_per_rank": problem.tokens_per_rank,
            "cp": problem.cp,
            "dtype": str(problem.dtype).removeprefix("torch."),
        }


ON_CPU = Options(preset="tiny", documents=(0, 4), rounds=5)


def find_megatron(checkout: Path | None) -> None:
    """Raise ValueError if there is no Megatron-LM: neither in a checkout, if one is given, nor installed."""
    if checkout is not None and not (checkout / "megatron" / "core").is_dir():
        raise ValueError(f"checkout must be a folder of Megatron-LM, got {checkout}: it has no megatron/core")
    if checkout is None and importlib.util.find_spec("megatron") is None:
        raise ValueError("megatron-core is not installed: pip install --no-deps megatron-core, or --checkout")


def _is_old() -> bool:
    """Return whether the installed megatron-core is 0.16 or older."""
    major, minor, *_ = metadata.version("megatron-core").split(".")
    return (int(major), int(minor)) <= (0, 16)


def set_variables() -> None:
    """Set what Megatron-LM and deterministic kernels need, unless it is set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def benchmark_on_rank(device: torch.device, options: Options, problem: Problem) -> None:
    """Run one rank; rank 0 prints the table and writes the record."""
    warnings.filterwarnings("ignore", module="megatron")  # about what is not installed
    if options.checkout is not None:
        sys.path.insert(0, str(options.checkout.resolve()))
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            from dropin.cpu import megatron_on_cpu

            stack.enter_context(megatron_on_cpu())
        from dropin.without_te import megatron_without_te

        stack.enter_context(megatron_without_te())
        from dropin import benchmark, report

        console, out = rank_console(), options.out
        record = benchmark.run(options.plan(problem), device, options.recorded(problem), out, console)
    if console.quiet:
        return
    paths = [write_record(record, out / "results.json"), out / "results.md"]
    paths[1].write_text(report.markdown_of(record))
    if options.rounds:
        report.draw(record, out / "step_time.png")
        paths.append(out / "step_time.png")
    console.print(report.table_of(record))
    console.print("wrote " + ", ".join(map(str, paths)), soft_wrap=True)


def draw_records(paths: tuple[Path, ...], out: Path) -> None:
    """Draw the ratios of several records into `step_time.png` in `out`."""
    from dropin import report

    with usage_errors():
        check_out(out, "step_time.png")
        record = report.read_together(paths)
    report.draw(record, out / "step_time.png")
    print(f"wrote {out / 'step_time.png'}")


def main() -> None:
    set_variables()
    about = (
        "Time training steps of Megatron-LM with its own rolls, with the drop-in, and with local rolls, and compare "
        "all bits. The core attention is ours: Megatron-LM's own needs Transformer Engine under context parallelism."
    )
    options = parse_options(Options, about, on_cpu=ON_CPU)
    if options.draw:
        draw_records(options.draw, options.out)
        return
    with usage_errors():
        problem = options.problem()
        check_out(options.out, "results.json", "results.md", "step_time.png")
        if options.profile == "torch":
            check_out(options.profile_out)
    run_on_ranks(benchmark_on_rank, options.ranks, options.device, options, problem)
    if os.environ.get("RANK", "0") != "0":  # rank 0 has the record
        return
    if not json.loads((options.out / "results.json").read_text())["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
