"""One rank of the benchmark: all numbers of documents, their bits, times, and training."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console

from dropin import report
from dropin.bits import as_expected, compare_bits
from dropin.model import MegatronModel, initialize
from dropin.modes import modes_of
from dropin.sizes import Problem
from dropin.subject import Subject
from dropin.switch import Switch
from dropin.timing import Rounds, time_modes
from dropin.training import train_both
from harness import environment
from harness.command import write_record
from harness.rounds import recording
from overlap_mtp import megatron as drop_in

BITS_SEED = 7


@dataclass(frozen=True)
class Plan:
    """What a benchmark runs."""

    problem: Problem
    documents: tuple[int, ...]  # 0: dense
    modes: tuple[str, ...]
    rounds: Rounds  # of 0 rounds: nothing is timed
    schedule: str
    transport: str
    train_steps: int
    optimizer: str
    profile: str | None
    profile_out: Path


def run(
    plan: Plan, device: torch.device, settings: dict[str, Any], out: Path, console: Console
) -> dict[str, Any]:
    """Run one rank; rank 0 prints tables as they come, and writes `results.json` after each number of documents.

    Args:
        plan: what to run.
        device: of this rank.
        settings: for the record.
        out: an existing folder.
        console: which prints on rank 0 only.

    Returns:
        The record. It is complete on rank 0.
    """
    initialize(plan.problem)
    switch = Switch(plan.schedule, plan.transport, traced=plan.profile is not None)
    subject = Subject(plan.problem, MegatronModel(plan.problem, device), switch, device, console)
    where = environment.describe(device, dist.get_world_size())
    record: dict[str, Any] = {
        "experiment": "megatron_step",
        "command": environment.command(),
        "where": {**where, "megatron_core": megatron.core.__version__},
        "settings": settings,
        "parameters": subject.model.num_parameters,
        "runs": {},
        "passed": True,
    }
    for documents in plan.documents:
        name = str(documents or "dense")
        found = _run_documents(plan, subject, documents)
        record["passed"] = found.pop("passed") and record["passed"]
        record["runs"][name] = found
        if dist.get_rank() == 0:
            write_record(record, out / "results.json")
    if device.type == "cuda":
        record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    switch.close()
    del subject
    gc.collect()
    parallel_state.destroy_model_parallel()
    return record


def _run_documents(plan: Plan, subject: Subject, documents: int) -> dict[str, Any]:
    modes = modes_of(plan.modes, documents)
    found: dict[str, Any] = {"passed": True}
    drop_in.reset_status()
    bits = compare_bits(subject, modes, subject.batch(documents, BITS_SEED))
    if bits is not None:
        found["bits"], found["passed"] = bits, as_expected(bits)
    if plan.rounds.count:
        recorded = recording(plan.profile, plan.profile_out, dist.get_rank())
        timed = time_modes(subject, modes, documents, plan.rounds, recorded)
        found |= timed or {}
    if plan.train_steps:
        training = train_both(subject, documents, plan.train_steps, plan.optimizer)
        if training is not None:
            subject.console.print(report.training_line(training))
            same = training["equal_steps"] == training["steps"] and training["weights_equal"]
            found |= {"training": training, "passed": found["passed"] and same}
    status = drop_in.status()
    subject.console.print(
        f"{report.documents_of(str(documents or 'dense'))}, the drop-in on rank 0:\n{status}"
    )
    found["status"] = {
        "answered": status.answered,
        "exchanges": status.exchanges,
        "transports": status.transports,
        "fallbacks": dict(status.fallbacks),
    }
    return found
