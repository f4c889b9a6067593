"""One training run on one rank: batches, steps, records, checkpoints."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.environment import describe
from harness.launch import timeout_of_groups
from overlap_mtp.layout import length_unit
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules import SCHEDULES
from overlap_mtp.schedules.prepared import prepare
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.training.checkpoint import Checkpoints, NoCheckpointError
from overlap_mtp.training.data import BatchStream, open_corpus
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.step_log import StepLog
from overlap_mtp.training.trainer import Microbatch, StepReport, TrainConfig, Trainer, shares
from overlap_mtp.training.watchdog import Watchdog, collectives_begun
from training.curves import LOG, draw_losses

SHORTEST_DEADLINE = timedelta(seconds=5)  # ranks that start say nothing for seconds
LINES = 20  # of a run, where there is no terminal to show its progress
SHARED_BY = 8  # documents are padded so that 1, 2, 4 and 8 cp ranks see the same batches


@dataclass(frozen=True)
class RunSettings:
    """All that a run is made of."""

    model: ModelConfig
    recipe: TrainConfig
    sizes: ParallelDims
    schedule: str
    seq_len: int
    num_documents: int | None  # None: dense
    out: Path
    resume: bool = False
    data: Path | None = None
    token_dtype: str = "uint16"
    recompute: bool = False
    compiled: bool = False
    deterministic: bool = False
    save_every: int = 100
    keep: int = 3
    deadline: timedelta = timedelta(seconds=60)
    save_deadline: timedelta = timedelta(hours=1)  # where all save or load; who dies is found all the same
    seed: int = 0

    def check(self, world_size: int) -> None:
        """Raises ValueError where something is illegal, before any rank is started; else makes the run's folder."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        self.sizes.check(self.model, self.seq_len, "zigzag", world_size)
        if self.compiled and self.sizes.tp > 1:
            raise ValueError(f"--compile and tp > 1 do not go together, got tp {self.sizes.tp}")
        for name, least in (("keep", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.deadline < SHORTEST_DEADLINE:
            raise ValueError(
                f"deadline must be >= {SHORTEST_DEADLINE.total_seconds():g} s, got {self.deadline.total_seconds():g}"
            )
        self.stream()
        has_log = (self.out / LOG).exists() and (self.out / LOG).stat().st_size
        if not self.resume and (has_log or Checkpoints(self.out / "checkpoints").latest()):
            raise ValueError(f"{self.out} holds a run: go on with --resume, or take another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out must be a folder, or a path for one: {error}") from None

    def stream(self) -> BatchStream:
        """Of batches of one sequence each, the same for every number of ranks."""
        return BatchStream(
            open_corpus(self.data, self.token_dtype).shuffled(self.seed),
            self.seq_len,
            1,
            self.sizes.cp,
            "zigzag",
            self.model.vocab_size,
            self.num_documents,
            multiple_of=self._multiple_of,
        )

    @property
    def _multiple_of(self) -> int:
        return math.lcm(*(length_unit(cp, "zigzag") for cp in (SHARED_BY, self.sizes.cp)))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to go on from it: the model, the recipe and the data's order."""
        recipe = {f"recipe.{name}": value for name, value in asdict(self.recipe).items()}
        recipe["dp * accumulate"] = self.sizes.dp * recipe.pop("recipe.accumulate")
        data = {
            "data": open_corpus(self.data, self.token_dtype).fingerprint,
            "token_dtype": self.token_dtype,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_documents": self.num_documents,
            "documents' lengths are multiples of": self._multiple_of if self.num_documents else None,
        }
        return {**asdict(self.model), **recipe, **data}


class Run:
    """The model, its optimizer and its data on one rank, and how far they are."""

    def __init__(
        self,
        settings: RunSettings,
        device: torch.device,
        parallel: ParallelMesh,
        savers: dist.ProcessGroup | None,
        on_phase: Callable[[str], None],
    ) -> None:
        """`savers`: all ranks, for those that save and load."""
        self.settings, self.device, self.parallel = settings, device, parallel
        torch.manual_seed(settings.seed)
        torch.use_deterministic_algorithms(settings.deterministic)
        # Slow, and nothing here reads what was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        with device:
            documents = max(128, settings.num_documents or 0)
            model = GPT(settings.model, parallel.cp_group, settings.schedule, documents)
        model.recompute_layers(settings.recompute)
        compute = torch.bfloat16 if device.type == "cuda" else None
        self.model = parallelize(model, parallel, compute)
        if settings.compiled:
            self.model.compile_layers()
        optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.trainer = Trainer(self.model, optimizer, settings.recipe, parallel, on_phase)
        self.stream = settings.stream()
        self.checkpoints = Checkpoints(
            settings.out / "checkpoints", settings.keep, sizes=asdict(settings.sizes), group=savers
        )
        self.identity = settings.identity
        self.timed = TimedRoller(self.model.mtp.roller)
        self.steps_done = 0
        self.batches_done = 0  # of all dp ranks: where the next step's data begins
        depths = settings.model.num_depths
        self.right, self.counted = [0.0] * (1 + depths), [0.0] * (1 + depths)  # of all steps

    def load(self) -> None:
        """Goes on from the last checkpoint, or from the start where the run was killed before its first.

        Collective; raises CheckpointError on all ranks where the checkpoint is none to go on from.
        """
        trainer = self.trainer
        try:
            progress = self.checkpoints.load(self.model, trainer.optimizer, trainer.scheduler, self.identity)
        except NoCheckpointError:
            return
        self.steps_done, self.batches_done = progress["steps_done"], progress["batches_done"]
        self.right, self.counted = progress["right"], progress["counted"]

    def save(self) -> None:
        progress = {
            "steps_done": self.steps_done,
            "batches_done": self.batches_done,
            "right": self.right,
            "counted": self.counted,
        }
        trainer = self.trainer
        self.checkpoints.save(
            self.steps_done, self.model, trainer.optimizer, trainer.scheduler, progress, self.identity
        )

    @property
    def beginning(self) -> str:
        """What is trained on what, and from where on."""
        settings, corpus = self.settings, self.stream.corpus
        parameters = sum(one.numel() for one in self.model.parameters())
        known = {"experts": settings.model.num_experts, "documents": settings.num_documents}
        lines = [
            f"{parameters / 1e6:,.1f} M parameters, "
            + "".join(f"{count} {name}, " for name, count in known.items() if count)
            + f"{settings.seq_len} tokens a sequence; dp {settings.sizes.dp} x cp {settings.sizes.cp} x tp "
            f"{settings.sizes.tp}, {settings.schedule}; data: {len(corpus.documents):,} documents, "
            f"{corpus.bounds[-1]:,} tokens"
        ]
        folder, steps = self.checkpoints.folder, settings.recipe.steps
        if self.steps_done:
            left = "all are done" if self.steps_done == steps else f"goes on with step {self.steps_done + 1}"
            lines.append(f"step {self.steps_done} of {steps} is in {folder}: {left}")
        elif settings.resume:
            lines.append(f"no checkpoint in {folder}: begins with step 1")
        return "\n".join(lines)

    def step(self) -> dict[str, Any]:
        """Takes a step; its record."""
        begin = time.perf_counter()
        first, rate = self.batches_done, self.trainer.optimizer.param_groups[0]["lr"]
        microbatches = list(self._microbatches())
        self.batches_done += len(microbatches) * self.settings.sizes.dp
        where = f"step {self.steps_done + 1}, batches {first} to {self.batches_done - 1} (from 0)"
        report = self.trainer.step(microbatches, self.timed, where, first)
        self.steps_done += 1
        self.right = [a + b for a, b in zip(self.right, report.right, strict=True)]
        self.counted = [a + b for a, b in zip(self.counted, report.counted, strict=True)]
        return self._record(report, rate, time.perf_counter() - begin)

    def _microbatches(self) -> Iterator[Microbatch]:
        """In the order of the data: dp ranks take one each, then the next."""
        parallel, dp = self.parallel, self.settings.sizes.dp
        for number in range(self.settings.recipe.accumulate):
            full, layout = self.stream.batch(self.batches_done + number * dp + parallel.dp_rank)
            if self.settings.model.derive_labels:
                del full["labels"]
            if self.settings.schedule == "prepared":
                full = prepare(full, layout, self.settings.model.depths_rolled)
            yield {n: layout.shard(t, parallel.cp_rank).to(self.device) for n, t in full.items()}, layout

    def _record(self, report: StepReport, rate: float, seconds: float) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        cost = self.timed.read()
        losses = [report.lm_loss, *report.mtp_losses]
        known = [loss if count else None for loss, count in zip(losses, report.counted, strict=True)]
        return {
            "step": self.steps_done,
            "batches": self.batches_done,
            "loss": report.loss,
            "lm_loss": known[0],
            "mtp_losses": known[1:],
            "aux_loss": report.aux_loss,
            "acceptance": report.acceptance,
            "cumulative_acceptance": shares(self.right, self.counted)[1:],
            "grad_norms": report.grad_norms,
            "learning_rate": rate,
            "tokens": report.tokens,
            "tokens_per_s": round(report.tokens / seconds, 1),
            "stall_us": cost.stall_us,
            "memory_gib": peak_memory(self.device) / 2**30,
        }


def train_on_rank(device: torch.device, settings: RunSettings, watchdog: Watchdog) -> None:
    """All steps of a run, from the start or from its last checkpoint."""
    # Making a group keeps all waiting, and is not counted: a phase each.
    watchdog.phase("making the mesh")
    parallel = ParallelMesh.make(settings.sizes, device.type, timeout_of_groups(settings.deadline))
    watchdog.follow(*map(collectives_begun, parallel.groups))
    watchdog.phase("making a group to save over")
    savers = dist.new_group(timeout=timeout_of_groups(max(settings.deadline, settings.save_deadline)))
    watchdog.phase("setting up")
    watchdog.follow(collectives_begun(savers))
    run = Run(settings, device, parallel, savers, watchdog.phase)
    timed = run.timed
    watchdog.follow(lambda: timed.begun)  # whose messages no group counts alike on all ranks
    if settings.resume:
        watchdog.phase("loading a checkpoint", settings.save_deadline)
        run.load()
    writes = dist.get_rank() == 0
    log = StepLog(settings.out / LOG, run.steps_done) if writes else None
    if writes:
        where = describe(device, dist.get_world_size())
        facts = {"settings": asdict(settings), "identity": run.identity, "where": where}
        del facts["settings"]["out"], facts["settings"]["data"]  # paths
        (settings.out / "run.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    steps, console = settings.recipe.steps, Console(quiet=not writes, soft_wrap=True, highlight=False)
    every = max(1, steps // LINES)
    console.print(run.beginning)
    if log is not None and log.missing:
        console.print(f"{log.path} lacks {log.missing} of the steps that the checkpoint holds")
    with progress_bar(console) as progress:
        task = progress.add_task("", total=steps, completed=run.steps_done)
        while run.steps_done < steps:
            watchdog.phase(f"step {run.steps_done + 1}: batches")
            record = run.step()
            if log is not None:
                log.write(record)
            progress.update(task, completed=run.steps_done, description=said(record))
            if not console.is_terminal and run.steps_done % every == 0:
                console.print(f"{run.steps_done}/{steps} {said(record)}")
            if run.steps_done == steps or (settings.save_every and run.steps_done % settings.save_every == 0):
                watchdog.phase(f"saving step {run.steps_done}", settings.save_deadline)
                if log is not None:
                    log.sync()
                run.save()
    watchdog.phase("drawing the losses")
    run.model.mtp.roller.close()
    if log is not None:
        log.close()
        written = [str(log.path)]
        if log.path.stat().st_size:
            draw_losses([settings.out], settings.out)
            written.append("losses.png")
        console.print(f"wrote {', '.join(written)} and checkpoints, the last of step {run.steps_done}")


def peak_memory(device: torch.device) -> int:
    """Bytes so far: allocated by torch on a GPU, on CPU resident of this process (Linux counts them in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def progress_bar(console: Console) -> Progress:
    """Of steps, with the last one in a line; on a terminal isolated."""
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


def said(record: dict[str, Any]) -> str:
    """A step in a line."""

    def all_of(values: list[float | None], form: str) -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    parts = [f"LM {all_of([record['lm_loss']], '.3f')}", f"MTP {all_of(record['mtp_losses'], '.3f')}"]
    if record["aux_loss"] is not None:
        parts.append(f"aux {record['aux_loss']:.3f}")
    parts.append(f"accepted {all_of(record['acceptance'], '.0%')}")
    parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    if record["stall_us"] is not None:
        parts.append(f"stall {record['stall_us']:.0f} µs")
    parts.append(f"{record['memory_gib']:.1f} GiB")
    return ", ".join(parts)
