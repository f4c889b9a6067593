"""Do losses and gradients stay what they were? Makes the values that tests/test_golden.py compares with.

    python experiments/golden.py            # prints what moved, and writes tests/golden/losses-*.json

Twenty steps in float64 on CPU ranks of a small model with experts, at a few sizes, dense and packed.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import torch
import torch.distributed as dist
import typer

from harness.launch import run_on_ranks
from overlap_mtp.model.gpt import GPT
from overlap_mtp.training.parallel import ParallelDims, parallelize
from overlap_mtp.training.trainer import TrainConfig, Trainer

FOLDER = Path(__file__).parent.parent / "tests/golden"
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2)]  # (tp, cp)
DOCUMENTS = ("dense", "packed")
STEPS = 20
BATCHES = 4  # taken in turn, so that there is something to learn
CONFIG = replace(parity.CONFIG, num_experts=4)

Values = dict[str, list[float]]  # by loss, a value a step


def path_of(documents: str) -> Path:
    return FOLDER / f"losses-{documents}.json"


def train(sizes: ParallelDims, documents: str) -> Values:
    """The losses and gradient norms of a run. Collective."""
    parallel = parity.mesh_of(sizes, "cpu")
    torch.manual_seed(0)
    model = parallelize(GPT(CONFIG, parallel.cp_group).double(), parallel)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    trainer = Trainer(model, optimizer, TrainConfig(STEPS, warmup_steps=5), parallel)
    layout = parity.layout_of(documents, sizes.cp)
    full = parity.batch_of(documents, BATCHES, CONFIG.vocab_size)
    values: Values = {}
    microbatches = parity.share_out(full, layout, parallel, torch.device("cpu"))
    for step in range(STEPS):
        report = trainer.step([microbatches[step % BATCHES]])
        named = {
            "LM": report.lm_loss,
            "aux": report.aux_loss or 0.0,
            "gradient norm": report.grad_norms["model"],
        }
        named |= {f"MTP {depth}": loss for depth, loss in enumerate(report.mtp_losses, start=1)}
        for name, value in named.items():
            values.setdefault(name, []).append(value)
    model.mtp.roller.close()
    return values


def train_on_rank(device: torch.device, sizes: list[tuple[int, int]], out: Path) -> None:
    found = {}
    for tp, cp in sizes:
        for documents in DOCUMENTS:
            found[f"{documents} tp {tp} cp {cp}"] = train(ParallelDims(1, cp, tp), documents)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def compute() -> dict[str, dict[str, Values]]:
    """The values of all runs, by documents and sizes."""
    found: dict[str, dict[str, Values]] = {documents: {} for documents in DOCUMENTS}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({tp * cp for tp, cp in SIZES}):
            path = Path(folder) / f"{ranks}.json"
            run_on_ranks(
                train_on_rank, ranks, "cpu", [one for one in SIZES if one[0] * one[1] == ranks], path
            )
            for name, values in json.loads(path.read_text()).items():
                documents, _, sizes = name.partition(" ")
                found[documents][sizes] = values
    return found


def moved(old: dict[str, Values], new: dict[str, Values]) -> dict[str, float]:
    """The largest relative change of each loss of each run; infinite where one of the two lacks it."""
    changes = {}
    for sizes in {**old, **new}:
        for name in {**old.get(sizes, {}), **new.get(sizes, {})}:
            a, b = old.get(sizes, {}).get(name, []), new.get(sizes, {}).get(name, [])
            pairs = zip(a, b, strict=False)
            change = max((abs(x - y) / max(abs(x), 1e-30) for x, y in pairs), default=float("inf"))
            changes[f"{sizes}, {name}"] = change if len(a) == len(b) else float("inf")
    return changes


def main() -> None:
    """Writes the golden values anew, and says what moved."""
    for documents, found in compute().items():
        path = path_of(documents)
        before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        changes = {name: change for name, change in moved(before, found).items() if change > 1e-12}
        for name, change in changes.items():
            typer.echo(f"{documents}, {name}: moved by {change:.1e}")
        if not changes:
            typer.echo(f"{documents}: nothing moved by more than 1e-12")
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
