"""Are loss and every gradient those of one process, at any sizes?

    python experiments/parity.py --out out/parity                   # the whole matrix on CPU ranks, float64
    python experiments/parity.py --device cuda --out out/parity     # the sizes that fit the GPUs there are

The matrix of Megatron-LM's tests of the change that this project grew from (MR !3330): eight sizes (tp, cp), with and
without full recompute, dense and packed, here with data parallelism where eight ranks allow it, and with experts. Every
run loads the same checkpoint, which one process has saved, and takes one optimizer step with unequal numbers of
valid tokens on its ranks. On CPU the yardstick is `overlap_mtp.reference`, which shares no code with the model; on
GPUs the same model on one of them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from harness.environment import describe
from harness.launch import check_gpus, choose_device, run_on_ranks
from overlap_mtp.layout import SequenceLayout
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.model.reference import loss_reference
from overlap_mtp.reference import roll_reference
from overlap_mtp.training.checkpoint import Checkpoints
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.trainer import Microbatch, TrainConfig, Trainer

SIZES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]  # (tp, cp)
MOST_RANKS = 8
SEQ_LEN = 256
CONFIG = ModelConfig(
    hidden_size=32, num_layers=1, num_depths=2, num_heads=8, num_kv_heads=4, ffn_size=48, vocab_size=64
)
# Of the norm of each gradient, and of the loss.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2}
NEVER = 1e9  # no gradient is clipped
# On GPUs: wide enough for flash attention in bfloat16.
CONFIGS = {"cpu": CONFIG, "cuda": replace(CONFIG, hidden_size=512, ffn_size=1024, vocab_size=1024)}


@dataclass(frozen=True)
class Case:
    """One run against one process."""

    tp: int
    cp: int
    dp: int
    documents: str  # dense or packed
    recompute: bool
    dtype: str
    num_experts: int = 0

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def experts_per_token(self) -> int:
        """All of them in bfloat16: rounded otherwise, a token whose best experts are nearly alike goes to another one.

        That is a jump in the loss as a function of the weights, and nothing that a relative error can be bounded for:
        with 2 of 4 taken, a router's gradient was off by 8.7e-2 (tp = 2) and 1.1e-1 (tp = 4), dense, on H200.
        """
        return self.num_experts if self.dtype == "bfloat16" else min(2, self.num_experts)


def matrix(dtype: str, most_ranks: int = MOST_RANKS) -> list[Case]:
    """All cases that so many ranks can run."""
    cases = [
        Case(tp, cp, dp, documents, recompute, dtype, num_experts)
        for tp, cp in SIZES
        for dp, num_experts in ((1, 0), (2, 0), (1, 4))
        for documents in ("dense", "packed")
        for recompute in (False, True)
    ]
    return [case for case in cases if case.ranks <= most_ranks]


def layout_of(documents: str, cp_size: int) -> SequenceLayout:
    """The same tokens for every cp_size: a dense stream, or documents of which one is empty and two are padded."""
    if documents == "dense":
        return SequenceLayout.dense(SEQ_LEN, cp_size)
    return SequenceLayout.packed([0, 64, 64, 192, 256], cp_size, valid_lengths=[61, 0, 128, 3])


def batch_of(documents: str, rows: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """A full batch [rows, SEQ_LEN], of which other numbers of tokens count in each row and on each cp rank."""
    layout, generator = layout_of(documents, 1), torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab_size, (rows, SEQ_LEN), generator=generator)
    positions = torch.from_numpy(layout.unshard([layout.offsets(0)]))
    mask = (torch.rand(rows, SEQ_LEN, generator=generator) < 0.8).float()
    for row in range(rows):  # within what one rank holds of a dense stream, more in each row
        mask[row, : 20 + 8 * row] = 0
    return {
        "input_ids": ids,
        "labels": roll_reference(ids, layout, 1),
        "position_ids": positions.expand(rows, -1).contiguous(),
        "loss_mask": mask,
    }


def config_of(case: Case, device: torch.device) -> ModelConfig:
    config = CONFIGS[device.type]
    if not case.num_experts:
        return config
    return replace(config, num_experts=case.num_experts, experts_per_token=case.experts_per_token)


def share_out(
    full: dict[str, torch.Tensor], layout: SequenceLayout, parallel: ParallelMesh, device: torch.device
) -> list[Microbatch]:
    """This rank's microbatches of a full batch: dp ranks take a row each, then the next."""
    shards = {name: layout.shard(tensor, parallel.cp_rank).to(device) for name, tensor in full.items()}
    rows = range(parallel.dp_rank, len(full["input_ids"]), parallel.sizes.dp)
    return [({name: tensor[row, None] for name, tensor in shards.items()}, layout) for row in rows]


@cache
def mesh_of(sizes: ParallelDims, device_type: str) -> ParallelMesh:
    """One for all models of a process: each holds communicators, whose threads poll (gloo) or memory (NCCL)."""
    return ParallelMesh.make(sizes, device_type)


def new_model(case: Case, device: torch.device, group: dist.ProcessGroup | None = None) -> GPT:
    """With weights that a checkpoint is to replace, in the dtype that parameters have."""
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    return GPT(config_of(case, device), group).to(device, dtype)


def optimizer_of(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(case: Case, model: GPT, parallel: ParallelMesh, folder: Path) -> dict[str, Any]:
    """Loads the checkpoint, takes one step; its loss and gradients, whole."""
    optimizer = optimizer_of(model)
    recipe = TrainConfig(steps=1, clip_norm=NEVER, accumulate=case.dp // parallel.sizes.dp)
    trainer = Trainer(model, optimizer, recipe, parallel)
    checkpoints_of(case, folder).load(model, optimizer, trainer.scheduler, {"experts": case.num_experts})
    model.recompute_layers(case.recompute)
    layout = layout_of(case.documents, case.cp)
    full = batch_of(case.documents, case.dp, model.config.vocab_size)
    # A sequence for each dp rank; one process takes them one after the other.
    loss = trainer.step(share_out(full, layout, parallel, model.embedding.weight.device)).loss
    gradients = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[key] = whole.cpu().double()
    return {"loss": loss, "gradients": gradients}


def one_process(case: Case, device: torch.device, folder: Path) -> dict[str, Any]:
    """The yardstick: the oracle on CPU, the same model on one GPU."""
    if device.type == "cuda":
        parallel = mesh_of(ParallelDims(), "cuda")
        model = parallelize(new_model(case, device, parallel.cp_group), parallel, compute_dtype(case))
        return step(replace(case, cp=1), model, parallel, folder)
    model = new_model(case, device)
    optimizer = optimizer_of(model)
    scheduler = Trainer(model, optimizer, TrainConfig(steps=1)).scheduler
    checkpoints_of(case, folder).load(model, optimizer, scheduler, {"experts": case.num_experts})
    model.double()
    batch = batch_of(case.documents, case.dp, model.config.vocab_size)
    loss = loss_reference(model, batch, layout_of(case.documents, 1))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": float(loss.detach()), "gradients": gradients}


def compute_dtype(case: Case) -> torch.dtype | None:
    return torch.bfloat16 if case.dtype == "bfloat16" else None


def checkpoints_of(case: Case, folder: Path) -> Checkpoints:
    return Checkpoints(folder / f"checkpoint-{case.dtype}-{case.num_experts}")


def yardstick_path(case: Case, folder: Path) -> Path:
    return folder / f"{case.dtype}-{case.documents}-{case.dp}-{case.num_experts}.pt"


def prepare_on_rank(device: torch.device, cases: list[Case], folder: Path) -> None:
    """One process: the checkpoints that all load, and what they are compared with."""
    for case in cases:
        checkpoints = checkpoints_of(case, folder)
        if checkpoints.latest() is None:
            torch.manual_seed(0)
            model = new_model(case, device)
            optimizer = optimizer_of(model)
            scheduler = Trainer(model, optimizer, TrainConfig(steps=1)).scheduler
            checkpoints.save(0, model, optimizer, scheduler, {}, {"experts": case.num_experts})
        path = yardstick_path(case, folder)
        if not path.exists():
            torch.save(one_process(case, device, folder), path)


def measure_on_rank(device: torch.device, cases: list[Case], folder: Path, record: Path) -> None:
    rows = []
    for case in cases:
        parallel = mesh_of(ParallelDims(case.dp, case.cp, case.tp), device.type)
        model = parallelize(new_model(case, device, parallel.cp_group), parallel, compute_dtype(case))
        found = step(case, model, parallel, folder)
        model.mtp.roller.close()
        rows.append(
            asdict(case)
            | {"experts_per_token": case.experts_per_token}
            | errors(found, torch.load(yardstick_path(case, folder)), TOLERANCE[case.dtype])
        )
    if dist.get_rank() == 0:
        record.write_text(json.dumps({"where": describe(device, dist.get_world_size()), "rows": rows}))


def errors(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Relative errors: of the loss, and of the gradient that is furthest off."""
    off = {
        name: float((found["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-30))
        for name, gradient in expected["gradients"].items()
    }
    where = max(off, key=lambda name: (math.isnan(off[name]), off[name]))
    loss = abs(found["loss"] - expected["loss"]) / abs(expected["loss"])
    passed = loss <= tolerance and off[where] <= tolerance
    return {
        "loss": found["loss"],
        "loss_error": loss,
        "gradient_error": off[where],
        "worst": where,
        "passed": passed,
    }


def measure(cases: list[Case], device: str, folder: Path, share_gpus: bool = False) -> dict[str, Any]:
    """Runs all cases, those of as many ranks in one launch; their rows and where they ran."""
    run_on_ranks(prepare_on_rank, 1, device, cases, folder)
    record: dict[str, Any] = {"rows": []}
    for ranks in sorted({case.ranks for case in cases}):
        path = folder / f"{ranks}.json"
        theirs = [case for case in cases if case.ranks == ranks]
        run_on_ranks(measure_on_rank, ranks, device, theirs, folder, path, share_gpus=share_gpus)
        found = json.loads(path.read_text())
        record = {"where": found["where"], "rows": record["rows"] + found["rows"]}
    return record


def markdown_of(record: dict[str, Any]) -> str:
    rows, where = record["rows"], record["where"]
    good = sum(row["passed"] for row in rows)
    lines = [
        f"{good} of {len(rows)} within tolerance; {where['device']}, torch {where['torch']}, {where['date']}",
        "",
    ]
    lines += [
        "| tp | cp | dp | documents | recompute | experts | dtype | loss error | worst gradient error | |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        words = [row["tp"], row["cp"], row["dp"], row["documents"], "full" if row["recompute"] else "none"]
        experts = f"{row['experts_per_token']} of {row['num_experts']}" if row["num_experts"] else "-"
        words += [experts, row["dtype"], f"{row['loss_error']:.1e}"]
        words += [f"{row['gradient_error']:.1e} ({row['worst']})", "ok" if row["passed"] else "**NO**"]
        lines.append("| " + " | ".join(str(word) for word in words) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")] = Path("out/parity"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtypes: Annotated[str | None, typer.Option(help="float64, float32, bfloat16.")] = None,
    most_ranks: Annotated[int | None, typer.Option(help="Leave larger sizes out.")] = None,
    share_gpus: Annotated[bool, typer.Option("--share-gpus", help="Several ranks on a GPU; slow.")] = False,
) -> None:
    """Prints and records the table; exit status 1 if a case is outside of its tolerance."""
    try:
        on_gpu = choose_device(device) == "cuda"
        ranks = most_ranks or (torch.cuda.device_count() if on_gpu else MOST_RANKS)
        check_gpus(ranks, device, share_gpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    chosen = (dtypes or ("float32,bfloat16" if on_gpu else "float64")).split(",")
    for dtype in chosen:
        if dtype not in TOLERANCE or (dtype == "bfloat16" and not on_gpu):
            raise typer.BadParameter(
                f"dtypes must be among {', '.join(TOLERANCE)} (bfloat16 on GPUs), got {dtype!r}"
            )
    console = Console(width=200)
    cases = [case for dtype in chosen for case in matrix(dtype, ranks)]
    with tempfile.TemporaryDirectory() as folder:
        record = measure(cases, device, Path(folder), share_gpus)
    record["where"]["ranks"] = ranks
    out.mkdir(parents=True, exist_ok=True)
    (out / "parity.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "parity.md").write_text(markdown_of(record))
    console.print(markdown_of(record), markup=False)
    if not all(row["passed"] for row in record["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
