"""What does a training step of Megatron-LM cost with its own rolls, with the drop-in, and with rolls that send nothing?

    python experiments/megatron_step.py                                        (two CPU ranks, tiny; or all GPUs)
    python experiments/megatron_step.py --size h4096 --documents dense,8,32,128 --out out/megatron
    torchrun --nproc-per-node 4 experiments/megatron_step.py --size h2048
    python experiments/megatron_step.py --rounds 0 --train-steps 200 --documents dense,8

Needs megatron-core, from PyPI or a checkout of Megatron-LM that `--checkout` names, but no Transformer Engine: the core
attention is ours, because Megatron-LM's own needs that package under context parallelism. Everything else of the model
is Megatron-LM's. The modes:

    megatron        Megatron-LM's own rolls, with cu_seqlens on the GPU as pretrain_gpt.py has them
    megatron_host   the same with cu_seqlens in host memory (packed documents only)
    dropin          overlap_mtp.megatron
    dropin_host     the same with cu_seqlens in host memory (packed documents only)
    none            local rolls, which send nothing: wrong tokens, for timing only. All ratios are to this one

Every round runs one step (forward and backward, without optimizer) of each mode in random order, on the same weights
and batch. Before that, one step of each mode is compared with Megatron-LM's, bit for bit. Writes `results.json`,
`results.md` and `step_time.png` into `--out`. Exit status 1: a bit differs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dropin.modes import MODES
from dropin.sizes import Problem, problem_of
from harness.command import (
    RankOptions,
    Words,
    check_among,
    check_least,
    check_out,
    parse_options,
    usage_errors,
    write_record,
)
from harness.launch import run_on_ranks
from harness.rounds import rank_console

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
class Options:
    """One benchmark."""

    size: str | None = None
    """tiny, h2048 or h4096; by default tiny on CPU, else h4096."""
    documents: Words | None = None
    """`dense` (or 0), and numbers of packed documents; by default dense,8,32, on CPU dense,4."""
    modes: Words = MODES
    """megatron, megatron_host, dropin, dropin_host; `none`, the baseline, always runs."""
    rounds: int | None = None
    """Timed rounds, 0 for none; by default 80, on CPU 5."""
    warmup: int = 3
    """Rounds before them."""
    limit: float = 60.0
    """Seconds for the rounds of one number of documents: then the rounds end."""
    micro: int = 1
    """Microbatches of a step, back to back."""
    depths: int = 2
    """MTP layers."""
    schedule: str = "prefetch"
    """Of the drop-in."""
    transport: Literal["auto", "process_group", "symmetric"] = "auto"
    """Of the drop-in."""
    recompute: bool = False
    """Compute each layer's activations again in the backward pass. megatron-core 0.16 cannot do so with documents."""
    tp: int = 1
    """Ranks of a tensor-parallel group; the others are context-parallel."""
    sequence_parallel: bool = False
    """Share the tokens between layers among the tp ranks."""
    train_steps: int = 0
    """Also train this number of steps with and without the drop-in, and compare all losses."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Of --train-steps."""
    checkout: Path | None = None
    """A checkout of Megatron-LM to use in place of the installed megatron-core."""
    profile: Literal["nsys", "torch"] | None = None
    """Record the rounds of one number of documents. nsys: start and stop its capture; torch: write traces."""
    profile_out: Path = Path("out/profile")
    """Folder of the traces of --profile torch."""
    out: Path = Path("out/megatron_step")
    """Folder for the record, the table and the picture."""
    where: RankOptions = field(default_factory=RankOptions)

    @property
    def chosen_size(self) -> str:
        """The name of the size."""
        return self.size or ("h4096" if self.where.on_gpu else "tiny")

    @property
    def chosen_documents(self) -> tuple[int, ...]:
        """The numbers of documents. Raises ValueError if one is no number."""
        words = self.documents or (("dense", "8", "32") if self.where.on_gpu else ("dense", "4"))
        for word in words:
            if word != "dense" and not word.isdecimal():
                raise ValueError(f"documents must be `dense` or whole numbers, got {word!r}")
        return tuple(dict.fromkeys(0 if word == "dense" else int(word) for word in words))

    @property
    def chosen_rounds(self) -> int:
        """The number of timed rounds."""
        return (80 if self.where.on_gpu else 5) if self.rounds is None else self.rounds

    def problem(self) -> Problem:
        """Return what the steps compute. Raises ValueError for anything illegal, before any rank starts."""
        check_least(self, rounds=0, warmup=1, limit=0, micro=1, depths=1, train_steps=0)
        if self.rounds == 1:
            raise ValueError("--rounds must be 0 or at least 2, got 1")
        check_among(self, modes=MODES)
        if (self.profile or self.transport == "symmetric") and not self.where.on_gpu:
            raise ValueError("--profile and --transport symmetric need GPUs")
        if self.profile and len(self.chosen_documents) > 1:
            raise ValueError("--profile needs one number of documents, as in --documents 32")
        dtype = torch.bfloat16 if self.where.on_gpu else torch.float32
        problem = problem_of(
            self.chosen_size,
            self.depths,
            self.where.count,
            self.tp,
            self.sequence_parallel,
            self.recompute,
            dtype,
        )
        for documents in self.chosen_documents:
            problem.check_documents(documents)
        find_megatron(self.checkout)
        if self.recompute and any(self.chosen_documents) and self.checkout is None and _is_old():
            raise ValueError(
                "--recompute needs --documents dense with megatron-core 0.16, whose MTP layers cannot recompute "
                "packed documents: or give --checkout"
            )
        return problem

    def plan(self, problem: Problem) -> Plan:
        """Return what a rank runs."""
        from dropin.benchmark import Plan
        from dropin.timing import Rounds

        return Plan(
            problem,
            self.chosen_documents,
            self.modes,
            Rounds(self.chosen_rounds, self.warmup, self.micro, self.limit),
            self.schedule,
            self.transport,
            self.train_steps,
            self.optimizer,
            self.profile,
            self.profile_out,
        )

    def recorded(self, problem: Problem) -> dict[str, Any]:
        """Return the settings for the record, without any path."""
        own = {k: v for k, v in asdict(self).items() if k not in ("out", "profile_out", "where", "profile")}
        return {
            **own,
            "size": self.chosen_size,
            "documents": self.chosen_documents,
            "rounds": self.chosen_rounds,
            "checkout": self.checkout is not None,
            "tokens_per_rank": problem.tokens_per_rank,
            "cp": problem.cp,
            "dtype": str(problem.dtype).removeprefix("torch."),
        }


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
    if options.chosen_rounds:
        report.draw(record, out / "step_time.png")
        paths.append(out / "step_time.png")
    console.print(report.table_of(record))
    console.print("wrote " + ", ".join(map(str, paths)), soft_wrap=True)


def main() -> None:
    set_variables()
    about = (
        "Time training steps of Megatron-LM with its own rolls, with the drop-in, and with local rolls, and compare "
        "all bits. The core attention is ours: Megatron-LM's own needs Transformer Engine under context parallelism."
    )
    options = parse_options(Options, about)
    with usage_errors():
        problem, where = options.problem(), options.where
        check_out(options.out, "results.json", "results.md", "step_time.png")
        if options.profile == "torch":
            check_out(options.profile_out)
    run_on_ranks(benchmark_on_rank, where.ranks, where.device, options, problem)
    if os.environ.get("RANK", "0") != "0":  # rank 0 has the record
        return
    if not json.loads((options.out / "results.json").read_text())["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
