"""Are loss and every gradient those of one process, at any parallel dimensions?

    python experiments/parity.py --out out/parity                   # the whole matrix on CPU ranks, float64
    python experiments/parity.py --device cuda --out out/parity     # the cases that fit the GPUs of this machine

The matrix is that of Megatron-LM's tests of its merge request !3330: eight pairs (tp, cp), with and without full
recompute, dense and packed. Data parallelism is added if eight ranks allow it, and so are experts, and depths that use
rolled activations. Every run loads the same checkpoint, which one process has saved, and takes one
optimizer step with different numbers of valid tokens on its ranks. On CPU the result is compared with
`overlap_mtp.model.reference`, which shares no code with the model; on GPUs with the same model on one of them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console

from harness.command import (
    Words,
    check_least,
    check_out,
    default_is,
    parse_options,
    usage_errors,
    write_record,
)
from harness.environment import describe
from harness.launch import check_gpus, check_no_launcher, choose_device, run_on_ranks
from harness.progress import with_progress
from harness.rounds import rank_console
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.mixing import mixing_keys
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.reference import roll_reference
from overlap_mtp.training.checkpoint import Checkpoints
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.trainer import Microbatch, TrainConfig, Trainer

TP_CP = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
MOST_RANKS = 8
# What a model's depths do with rolled activations.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "embeddings": {"mtp_inputs": "embeddings"},
    "mixing": {"hidden_state_mixing": True},
    "distillation": {"distillation": "kl", "distillation_detach": False},
    "all": {"mtp_inputs": "embeddings", "hidden_state_mixing": True, "distillation": "tv"},
}
SEQ_LEN = 256
CONFIG = ModelConfig(
    hidden_size=32, num_layers=1, num_depths=2, num_heads=8, num_kv_heads=4, ffn_size=48, vocab_size=64
)
# Largest relative error of the loss and of each gradient.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2}
NO_CLIPPING = 1e9
# On GPUs the model is wide enough for flash attention in bfloat16.
CONFIGS = {"cpu": CONFIG, "cuda": replace(CONFIG, hidden_size=512, ffn_size=1024, vocab_size=1024)}


@dataclass(frozen=True)
class Case:
    """A run that is compared with one process."""

    tp: int
    cp: int
    dp: int
    documents: str  # dense or packed
    recompute: bool
    dtype: str
    num_experts: int = 0
    activations: str = "none"  # one of ACTIVATIONS

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def experts_per_token(self) -> int:
        """Two experts, but all of them in bfloat16: rounding there changes which of two equally good ones are chosen.

        The loss jumps then. With 2 of 4, a router's gradient was off by 8.7e-2 (tp = 2) and 1.1e-1 (tp = 4) on H200.
        """
        return self.num_experts if self.dtype == "bfloat16" else min(2, self.num_experts)


def matrix(dtype: str, most_ranks: int = MOST_RANKS) -> list[Case]:
    """Return all cases that `most_ranks` ranks can run."""
    options = product(TP_CP, ((1, 0), (2, 0), (1, 4)), ("dense", "packed"), (False, True))
    cases = [
        Case(tp, cp, dp, documents, recompute, dtype, num_experts)
        for (tp, cp), (dp, num_experts), documents, recompute in options
    ]
    with_activations = product(TP_CP, list(ACTIVATIONS)[1:], ("dense", "packed"), (False, True))
    cases += [
        Case(tp, cp, 1, documents, recompute, dtype, activations=activations)
        for (tp, cp), activations, documents, recompute in with_activations
    ]
    return [case for case in cases if case.ranks <= most_ranks]


def layout_of(documents: str, cp_size: int) -> SequenceLayout:
    """Lay out the same tokens at every cp_size: a dense stream, or documents, one empty and two padded."""
    if documents == "dense":
        return SequenceLayout.dense(SEQ_LEN, cp_size)
    return SequenceLayout.packed([0, 64, 64, 192, 256], cp_size, valid_lengths=[61, 0, 128, 3])


def batch_of(documents: str, rows: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return a full batch [rows, SEQ_LEN]. The number of tokens that count differs by row and by cp rank."""
    layout, generator = layout_of(documents, 1), torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab_size, (rows, SEQ_LEN), generator=generator)
    positions = torch.from_numpy(layout.unshard([layout.offsets(0)]))
    mask = (torch.rand(rows, SEQ_LEN, generator=generator) < 0.8).float()
    for row in range(rows):  # within the first chunk of a dense stream, more tokens in each row
        mask[row, : 20 + 8 * row] = 0
    return {
        "input_ids": ids,
        "labels": roll_reference(ids, layout, 1),
        "position_ids": positions.expand(rows, -1).contiguous(),
        "loss_mask": mask,
    }


def share_out(
    full: dict[str, torch.Tensor], layout: SequenceLayout, parallel: ParallelMesh, device: torch.device
) -> list[Microbatch]:
    """Return this rank's microbatches of a full batch: dp ranks take a row each, then the next."""
    shards = {name: layout.shard(tensor, parallel.cp_rank).to(device) for name, tensor in full.items()}
    rows = range(parallel.dp_rank, len(full["input_ids"]), parallel.dims.dp)
    return [({name: tensor[row, None] for name, tensor in shards.items()}, layout) for row in rows]


@cache
def mesh_of(dims: ParallelDims, device_type: str) -> ParallelMesh:
    """Make a mesh once per process: each holds communicators, which cost threads (gloo) or memory (NCCL)."""
    return ParallelMesh.make(dims, device_type)


def new_model(case: Case, device: torch.device, group: dist.ProcessGroup | None = None) -> GPT:
    """Return a model with parameters in the case's dtype, and random weights."""
    config = CONFIGS[device.type]
    config = replace(
        config,
        num_experts=case.num_experts,
        experts_per_token=case.experts_per_token,
        **ACTIVATIONS[case.activations],
    )
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    return GPT(config, group).to(device, dtype)


def new_trainer(case: Case, model: GPT, parallel: ParallelMesh | None = None) -> Trainer:
    """Parallelize a model, if there is a mesh, and return its trainer."""
    if parallel is not None:
        parallelize(model, parallel, torch.bfloat16 if case.dtype == "bfloat16" else None)
    config = TrainConfig(steps=1, clip_norm=NO_CLIPPING)
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config, parallel)


def step(case: Case, parallel: ParallelMesh, device: torch.device, folder: Path) -> dict[str, Any]:
    """Load the checkpoint and take one step. Return the loss and all gradients, whole."""
    trainer = new_trainer(case, model := new_model(case, device, parallel.cp_group), parallel)
    checkpoints_of(case, folder).load(model, trainer.optimizer, trainer.scheduler, identity={})
    model.recompute_layers(case.recompute)
    full = batch_of(case.documents, case.dp, model.config.vocab_size)
    loss = trainer.step(share_out(full, layout_of(case.documents, case.cp), parallel, device)).loss
    model.mtp.close()
    # They are DTensors after `parallelize`.
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss, "gradients": {n: g.full_tensor().cpu().double() for n, g in gradients.items()}}


def one_process(case: Case, device: torch.device, folder: Path) -> dict[str, Any]:
    """Compute what a case is compared with: the reference on CPU, the same model on one GPU."""
    if device.type == "cuda":
        return step(replace(case, cp=1), mesh_of(ParallelDims(), "cuda"), device, folder)
    torch.manual_seed(0)  # as for the checkpoint
    model = new_model(case, device).double()
    batch = batch_of(case.documents, case.dp, model.config.vocab_size)
    # The trainer's keys in its first step, which takes a row a batch.
    keys = [int(mixing_keys(0, 0, row, 1, device)) for row in range(case.dp)]
    loss = loss_reference(model, batch, layout_of(case.documents, 1), keys)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": float(loss.detach()), "gradients": gradients}


def checkpoints_of(case: Case, folder: Path) -> Checkpoints:
    return Checkpoints(folder / f"checkpoint-{case.dtype}-{case.num_experts}")


def expected_path(case: Case, folder: Path) -> Path:
    return folder / f"{case.dtype}-{case.documents}-{case.dp}-{case.num_experts}-{case.activations}.pt"


def prepare_on_rank(device: torch.device, cases: list[Case], folder: Path) -> None:
    """On one process, write the checkpoints that all cases load and the results that they are compared with."""
    for case in with_progress(cases, "cases prepared on one process", rank_console()):
        checkpoints = checkpoints_of(case, folder)
        if checkpoints.latest() is None:
            torch.manual_seed(0)
            trainer = new_trainer(case, new_model(case, device))
            checkpoints.save(0, trainer.model, trainer.optimizer, trainer.scheduler, {}, {})
        path = expected_path(case, folder)
        if not path.exists():
            torch.save(one_process(case, device, folder), path)


def measure_on_rank(
    device: torch.device, cases: list[Case], folder: Path, record: Path, done: int, total: int
) -> None:
    """Run the cases of one number of ranks, after `done` others of `total`; rank 0 writes their rows."""
    rows = []
    for case in with_progress(cases, "cases", rank_console(), done, total):
        parallel = mesh_of(ParallelDims(case.dp, case.cp, case.tp), device.type)
        found, expected = step(case, parallel, device, folder), torch.load(expected_path(case, folder))
        row = {**asdict(case), "experts_per_token": case.experts_per_token}
        rows.append(row | errors(found, expected, TOLERANCE[case.dtype]))
    if dist.get_rank() == 0:
        record.write_text(json.dumps({"where": describe(device, dist.get_world_size()), "rows": rows}))


def errors(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Return the relative errors of the loss and of the worst gradient."""
    off = {
        name: float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        for name, gradient in expected["gradients"].items()
    }
    worst = max(off, key=lambda name: (math.isnan(off[name]), off[name]))
    error = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
    passed = error <= tolerance and off[worst] <= tolerance
    row = {"loss": found["loss"], "loss_error": error}
    return row | {"gradient_error": off[worst], "worst": worst, "passed": passed}


def measure(cases: list[Case], device: str, folder: Path, share_gpus: bool = False) -> dict[str, Any]:
    """Run all cases, with one launch for each number of ranks. Return a row per case, and the hardware."""
    run_on_ranks(prepare_on_rank, 1, device, cases, folder)
    rows: list[dict[str, Any]] = []
    record = folder / "record.json"
    for ranks in sorted({case.ranks for case in cases}):
        theirs = [case for case in cases if case.ranks == ranks]
        progress = len(rows), len(cases)
        run_on_ranks(measure_on_rank, ranks, device, theirs, folder, record, *progress, share_gpus=share_gpus)
        found = json.loads(record.read_text())
        rows += found["rows"]
    return {"where": found["where"], "rows": rows}


def markdown_of(record: dict[str, Any]) -> str:
    rows, where = record["rows"], record["where"]
    good = sum(row["passed"] for row in rows)
    lines = [
        f"{good} of {len(rows)} within tolerance; {where['device']}, torch {where['torch']}, {where['date']}",
        "",
        "| tp | cp | dp | documents | recompute | experts | activations | dtype | loss error "
        "| worst gradient error | |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        experts = f"{row['experts_per_token']} of {row['num_experts']}" if row["num_experts"] else "-"
        cells = [row["tp"], row["cp"], row["dp"], row["documents"], "full" if row["recompute"] else "none"]
        cells += [experts, row["activations"], row["dtype"], f"{row['loss_error']:.1e}"]
        cells += [f"{row['gradient_error']:.1e} ({row['worst']})", "ok" if row["passed"] else "**NO**"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Options:
    """Which cases to run."""

    out: Path = Path("out/parity")
    """Folder for the record and the table."""
    device: Literal["cuda", "cpu"] = "cpu"
    """What the ranks run on."""
    dtypes: Annotated[Words | None, default_is("float64; float32,bfloat16 on GPUs")] = None
    """Types to compute in: float64, float32, and on GPUs bfloat16."""
    most_ranks: Annotated[int | None, default_is(f"{MOST_RANKS}, or the number of GPUs")] = None
    """Ranks of the largest cases to run."""
    share_gpus: bool = False
    """Allow several ranks on a GPU, which is slow."""


def main() -> None:
    options = parse_options(
        Options, "Print and record the table. Exit status 1: a case is outside of its tolerance."
    )
    with usage_errors():
        check_no_launcher()
        check_least(options, most_ranks=1)
        check_out(options.out, "parity.json", "parity.md")
        on_gpu = choose_device(options.device) == "cuda"
        ranks = options.most_ranks or (torch.cuda.device_count() if on_gpu else MOST_RANKS)
        check_gpus(ranks, options.device, options.share_gpus)
        dtypes = options.dtypes or (("float32", "bfloat16") if on_gpu else ("float64",))
        for dtype in dtypes:
            if dtype not in TOLERANCE or (dtype == "bfloat16" and not on_gpu):
                raise ValueError(
                    f"dtypes must be among {', '.join(TOLERANCE)} (bfloat16 on GPUs), got {dtype!r}"
                )
    cases = [case for dtype in dtypes for case in matrix(dtype, ranks)]
    with tempfile.TemporaryDirectory() as folder:
        record = measure(cases, options.device, Path(folder), options.share_gpus)
    record["where"]["ranks"] = ranks
    write_record(record, options.out / "parity.json")
    (options.out / "parity.md").write_text(markdown_of(record))
    Console(width=200).print(markdown_of(record), markup=False)
    sys.exit(not all(row["passed"] for row in record["rows"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
