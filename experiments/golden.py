"""Do losses and gradients stay what they were? Compute the values that tests/ranks/test_golden.py compares with.

    python experiments/golden.py            # prints what moved, and writes tests/golden/losses-*.json

A small model with experts takes twenty steps in float64 on CPU ranks, at a few pairs (tp, cp), dense and packed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parity
import torch
import torch.distributed as dist

from harness.command import check_out, parse_options, usage_errors, write_record
from harness.launch import check_no_launcher, run_on_ranks
from harness.progress import with_progress
from harness.rounds import rank_console
from overlap_mtp.model.gpt import GPT
from overlap_mtp.training.parallel import ParallelDims, parallelize
from overlap_mtp.training.trainer import TrainConfig, Trainer

FOLDER = Path(__file__).parent.parent / "tests/golden"
TP_CP = [(1, 1), (1, 2), (2, 1), (2, 2)]
DOCUMENTS = ("dense", "packed")
STEPS = 20
TOTAL = STEPS * len(DOCUMENTS) * len(TP_CP)
TOLD = 1e-12  # a relative change that is larger is printed
BATCHES = 4  # that repeat, so that the model learns
CONFIG = replace(parity.CONFIG, num_experts=4)

Values = dict[str, list[float]]  # by loss, one value per step


@dataclass(frozen=True)
class Options:
    """There are none."""


def path_of(documents: str) -> Path:
    return FOLDER / f"losses-{documents}.json"


def train(device: torch.device, dims: ParallelDims, out: Path, done: int) -> None:
    """Write the losses and gradient norms of the dense and of the packed run, after `done` other runs. Collective."""
    parallel, found = parity.mesh_of(dims, device.type), dict[str, Values]()
    for documents in DOCUMENTS:
        torch.manual_seed(0)
        model = parallelize(GPT(CONFIG, parallel.cp_group).double(), parallel)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        trainer = Trainer(model, optimizer, TrainConfig(STEPS, warmup_steps=5), parallel)
        full = parity.batch_of(documents, BATCHES, CONFIG.vocab_size)
        microbatches = parity.share_out(full, parity.layout_of(documents, dims.cp), parallel, device)
        values = found.setdefault(documents, {})
        steps = with_progress(range(STEPS), "steps", rank_console(), STEPS * done, TOTAL)
        done += 1
        for step in steps:
            report = trainer.step([microbatches[step % BATCHES]])
            norm = report.grad_norms["model"]
            named = {"LM": report.lm_loss, "aux": report.aux_loss, "gradient norm": norm}
            named |= {f"MTP {depth}": loss for depth, loss in enumerate(report.mtp_losses, start=1)}
            for name, value in named.items():
                assert value is not None
                values.setdefault(name, []).append(value)
        model.mtp.close()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def compute() -> dict[str, dict[str, Values]]:
    """Return the values of all runs, by documents and then by "tp 1 cp 2"."""
    found: dict[str, dict[str, Values]] = {documents: {} for documents in DOCUMENTS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.json"
        for index, (tp, cp) in enumerate(TP_CP):
            done = index * len(DOCUMENTS)
            run_on_ranks(train, tp * cp, "cpu", ParallelDims(1, cp, tp), path, done)
            for documents, values in json.loads(path.read_text()).items():
                found[documents][f"tp {tp} cp {cp}"] = values
    return found


def moved(old: dict[str, Values], new: dict[str, Values]) -> dict[str, float]:
    """Return the largest relative change of each loss of each run; infinite if one of the two lacks it."""
    before, after = (
        {f"{run}, {name}": losses for run, values in runs.items() for name, losses in values.items()}
        for runs in (old, new)
    )
    changes = dict.fromkeys({**before, **after}, float("inf"))
    for name in before.keys() & after.keys():
        if len(before[name]) == len(after[name]):
            pairs = zip(before[name], after[name], strict=True)
            changes[name] = max(_change(x, y) for x, y in pairs)
    return changes


def _change(x: float, y: float) -> float:
    """Return the relative change from x to y; infinite if only one of them is finite, or NaN."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0
    change = abs(x - y) / max(abs(x), 1e-30)
    return math.inf if math.isnan(change) else change


def said_of(old: dict[str, Values], new: dict[str, Values]) -> list[str]:
    """Return a line for each loss that moved by more than TOLD; if none did, how many values differ at all."""
    changes = {name: change for name, change in moved(old, new).items() if change > TOLD}
    if changes:
        return [f"{name} moved by {change:.1e}" for name, change in changes.items()]
    differ = sum(
        repr(x) != repr(y)  # a number's text tells all its bits
        for run, values in new.items()
        for name, losses in values.items()
        for x, y in zip(old[run][name], losses, strict=True)
    )
    if not differ:
        return ["every bit is the same"]
    values_differ = "1 value differs in its" if differ == 1 else f"{differ} values differ in their"
    return [f"nothing moved by more than {TOLD}, but {values_differ} last digits"]


def main() -> None:
    parse_options(Options, "Write the golden values again, and print what moved.")
    with usage_errors():
        check_no_launcher()
        check_out(FOLDER, *(path_of(documents).name for documents in DOCUMENTS))
    for documents, found in compute().items():
        path = path_of(documents)
        before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for line in said_of(before, found):
            print(f"{documents}: {line}")
        write_record(found, path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
