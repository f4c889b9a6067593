"""One training run on one rank: batches, steps, records, checkpoints."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import UseAppendAction

from harness.environment import describe
from harness.launch import check_gpus, choose_device, timeout_of_groups
from overlap_mtp.layout import length_unit
from overlap_mtp.model.config import PRESETS, ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules import SCHEDULES
from overlap_mtp.schedules.prepared import prepare
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.training.checkpoint import Checkpoints, NoCheckpointError
from overlap_mtp.training.data import BatchStream, Corpus, open_corpus
from overlap_mtp.training.parallel import ParallelDims, ParallelMesh, parallelize
from overlap_mtp.training.step_log import StepLog
from overlap_mtp.training.trainer import (
    Microbatch,
    Normalisation,
    StepReport,
    TrainConfig,
    Trainer,
    shares,
)
from overlap_mtp.training.watchdog import Watchdog, collectives_begun
from training.curves import LOG, draw_losses

SHORTEST_DEADLINE_S = 5.0  # starting ranks are silent for seconds
LINES = 20  # that a run prints if there is no terminal for a progress bar
SHARED_BY = 8  # documents are padded so that 1, 2, 4 and 8 cp ranks see the same batches


@dataclass(frozen=True)
class RunSettings:
    """The options of experiments/train.py."""

    out: Path | None = None  # The run's folder. Default: out/train, or out/curves for --curves.
    resume: bool = False  # Go on from the folder's last checkpoint.
    curves: UseAppendAction[tuple[Path, ...]] = ()  # Draw the losses of this run into --out, and train none.
    data: Path | None = None  # Text, a folder of it, or a .bin of token ids. Default: Python's library.
    token_dtype: str = "uint16"  # Of a .bin: uint16 or uint32.
    preset: str = "tiny"  # The model: tiny, small, h2048 or h4096.
    dp: int = 1  # Ranks that share no sequence.
    cp: int | None = None  # Ranks that share a sequence. Default: all that dp and tp leave.
    tp: int = 1  # Ranks that share each tensor.
    ranks: int | None = None  # Processes to start, if torchrun did not. Default: one for each GPU, or two.
    device: str | None = None  # cuda or cpu. Default: cuda if there is a GPU.
    share_gpus: bool = False  # Allow several ranks on a GPU; slow.
    schedule: str = "prefetch"  # sync, merged, overlap, prefetch or prepared.
    seq_len: int = 1024  # Tokens of a microbatch's sequence, over all cp ranks.
    documents: int = 8  # Documents packed into each sequence; 0: one dense stream.
    steps: int = 200  # Optimizer steps.
    accumulate: int = 1  # Microbatches of a rank in a step.
    learning_rate: float = 1e-3  # The highest learning rate.
    warmup: int | None = None  # Steps to reach it. Default: 20, or all if there are fewer.
    clip: float = 1.0  # Largest norm of the gradients.
    normalisation: Normalisation = "token"  # Divide losses by the tokens of the step, or of each batch.
    mtp_loss_factor: float = 0.3  # Weight of the mean loss of the MTP depths.
    depths: int = 2  # MTP depths.
    experts: int = 0  # Experts of each feed-forward layer; 0: none.
    experts_per_token: int = 2  # Experts that a token goes to.
    aux_loss_factor: float = 0.01  # Weight of the load-balancing loss.
    derive_labels: bool = False  # Take labels from input_ids.
    detach_mtp: bool = False  # Let MTP losses train the MTP block only.
    repeat_mtp_layer: bool = False  # Use one MTP layer for all depths.
    recompute: bool = False  # Keep no activations of layers; compute them again in backward.
    compile: bool = False  # Compile the layers; not with tp.
    deterministic: bool = False  # Give the same bits in every run on GPUs; slower.
    save_every: int = 100  # Steps from one checkpoint to the next; 0: save the last step only.
    keep: int = 3  # Checkpoints to keep.
    deadline: float = (
        60  # Seconds that ranks wait for one another; a silent rank is given up after a quarter of it.
    )
    save_deadline: float = 3600  # The same while ranks save or load.
    seed: int = 0  # Of the first weights and of the order of the documents.

    @property
    def folder(self) -> Path:
        return self.out or Path("out/train")

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.dp, 1 if self.cp is None else self.cp, self.tp)

    @property
    def model(self) -> ModelConfig:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        return replace(
            PRESETS[self.preset].model,
            num_depths=self.depths,
            mtp_loss_factor=self.mtp_loss_factor,
            num_experts=self.experts,
            experts_per_token=self.experts_per_token,
            aux_loss_factor=self.aux_loss_factor,
            derive_labels=self.derive_labels,
            detach_mtp=self.detach_mtp,
            repeat_mtp_layer=self.repeat_mtp_layer,
        )

    @property
    def train_config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(20, self.steps) if self.warmup is None else self.warmup,
            clip_norm=self.clip,
            accumulate=self.accumulate,
            normalisation=self.normalisation,
        )

    def resolved(self) -> RunSettings:
        """Choose the device, the number of ranks and cp, and make the run's folder.

        Raises:
            ValueError: if an option is illegal; no rank has been started yet.
        """
        device, others = choose_device(self.device), ParallelDims(self.dp, 1, self.tp).world
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or self.ranks or others * (self.cp or 0)
        ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2 * others)
        check_gpus(ranks, device, self.share_gpus)
        cp = max(1, ranks // others) if self.cp is None else self.cp
        settings = replace(self, device=device, ranks=ranks, cp=cp)
        settings._check(ranks)
        return settings

    def _check(self, ranks: int) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        self.dims.check(self.model, self.seq_len, "zigzag", ranks)
        if self.compile and self.tp > 1:
            raise ValueError(
                f"--compile and tp > 1 do not go together, got tp {self.tp}: leave one of them out"
            )
        for name, least, unit in (
            ("keep", 1, ""),
            ("save_every", 0, ""),
            ("deadline", SHORTEST_DEADLINE_S, " s"),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least:g}{unit}, got {getattr(self, name):g}")
        # These raise if an option is illegal.
        _ = self.train_config, timedelta(seconds=self.deadline), timedelta(seconds=self.save_deadline)
        self.stream(self.corpus())
        log = self.folder / LOG
        has_log = log.exists() and log.stat().st_size
        if not self.resume and (has_log or Checkpoints(self.folder / "checkpoints").latest()):
            raise ValueError(f"{self.folder} holds a run: go on with --resume, or give another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out must be a folder, or a path for one: {error}") from None

    def corpus(self) -> Corpus:
        return open_corpus(self.data, self.token_dtype)

    def stream(self, corpus: Corpus) -> BatchStream:
        """Return batches of one sequence each, the same for every number of ranks."""
        return BatchStream(
            corpus.shuffled(self.seed),
            self.seq_len,
            1,
            self.dims.cp,
            "zigzag",
            self.model.vocab_size,
            self.documents or None,
            multiple_of=self._multiple_of,
        )

    @property
    def _multiple_of(self) -> int:
        return math.lcm(*(length_unit(cp, "zigzag") for cp in (SHARED_BY, self.dims.cp)))

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """Return what a run must share with a checkpoint to go on from it: model, training and order of the data."""
        training = {f"train_config.{name}": value for name, value in asdict(self.train_config).items()}
        training["dp * accumulate"] = self.dp * training.pop("train_config.accumulate")
        data = {
            "data": corpus.fingerprint,
            "token_dtype": self.token_dtype,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_documents": self.documents or None,
            "documents' lengths are multiples of": self._multiple_of if self.documents else None,
        }
        return {**asdict(self.model), **training, **data}


class Run:
    """The model, optimizer and data of a run on one rank, and its progress."""

    def __init__(
        self,
        settings: RunSettings,
        device: torch.device,
        parallel: ParallelMesh,
        save_group: dist.ProcessGroup | None,
        on_phase: Callable[[str], None],
    ) -> None:
        """Build them on this rank. `save_group` holds all ranks, for saving and loading checkpoints."""
        self.settings, self.device, self.parallel = settings, device, parallel
        torch.manual_seed(settings.seed)
        torch.use_deterministic_algorithms(settings.deterministic)
        # Filling is slow, and nothing here reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        with device:
            model = GPT(
                settings.model,
                parallel.cp_group,
                settings.schedule,
                max_documents=max(128, settings.documents),
            )
        model.recompute_layers(settings.recompute)
        self.model = parallelize(model, parallel, torch.bfloat16 if device.type == "cuda" else None)
        if settings.compile:
            self.model.compile_layers()
        config = settings.train_config
        optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.trainer = Trainer(self.model, optimizer, config, parallel, on_phase)
        corpus = settings.corpus()
        self.stream, self.identity = settings.stream(corpus), settings.identity(corpus)
        self.checkpoints = Checkpoints(
            settings.folder / "checkpoints", settings.keep, sizes=asdict(settings.dims), group=save_group
        )
        self.timed = TimedRoller(self.model.mtp.roller)
        self.steps_done = 0
        self.batches_done = 0  # by all dp ranks: the next step's data begins here
        self.right, self.counted = (
            [0.0] * (1 + settings.depths),
            [0.0] * (1 + settings.depths),
        )  # of all steps

    def load(self) -> None:
        """Load the last checkpoint, if there is one. Collective.

        Raises:
            CheckpointError: on all ranks, if the checkpoint is damaged or belongs to another run.
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
    def introduction(self) -> str:
        """The model, the data and the step that the run begins with, for the log."""
        settings, corpus = self.settings, self.stream.corpus
        dims, parameters = settings.dims, sum(one.numel() for one in self.model.parameters())
        known = {"experts": settings.experts, "documents": settings.documents}
        lines = [
            f"{parameters / 1e6:,.1f} M parameters, "
            + "".join(f"{count} {name}, " for name, count in known.items() if count)
            + f"{settings.seq_len} tokens a sequence; dp {dims.dp} x cp {dims.cp} x tp {dims.tp}, "
            f"{settings.schedule}; data: {len(corpus.documents):,} documents, {corpus.bounds[-1]:,} tokens"
        ]
        folder, steps = self.checkpoints.folder, settings.steps
        if self.steps_done:
            rest = "all are done" if self.steps_done == steps else f"goes on with step {self.steps_done + 1}"
            lines.append(f"step {self.steps_done} of {steps} is in {folder}: {rest}")
        elif settings.resume:
            lines.append(f"no checkpoint in {folder}: begins with step 1")
        return "\n".join(lines)

    def step(self) -> dict[str, Any]:
        """Take a step, and return its record."""
        begin = time.perf_counter()
        first, rate = self.batches_done, self.trainer.optimizer.param_groups[0]["lr"]
        microbatches = list(self._microbatches())
        self.batches_done += len(microbatches) * self.settings.dp
        where = f"step {self.steps_done + 1}, batches {first} to {self.batches_done - 1} (from 0)"
        report = self.trainer.step(microbatches, self.timed, where, first)
        self.steps_done += 1
        self.right = [a + b for a, b in zip(self.right, report.right, strict=True)]
        self.counted = [a + b for a, b in zip(self.counted, report.counted, strict=True)]
        return self._record(report, rate, time.perf_counter() - begin)

    def _microbatches(self) -> Iterator[Microbatch]:
        """Yield this rank's microbatches: dp ranks take one each in the order of the data, then the next."""
        settings, parallel = self.settings, self.parallel
        for number in range(settings.accumulate):
            full, layout = self.stream.batch(self.batches_done + number * settings.dp + parallel.dp_rank)
            if settings.derive_labels:
                del full["labels"]
            if settings.schedule == "prepared":
                full = prepare(full, layout, settings.model.depths_rolled)
            yield {n: layout.shard(t, parallel.cp_rank).to(self.device) for n, t in full.items()}, layout

    def _record(self, report: StepReport, rate: float, seconds: float) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        cost = self.timed.read()
        return {
            "step": self.steps_done,
            "batches": self.batches_done,
            "loss": report.loss,
            "lm_loss": report.lm_loss,
            "mtp_losses": report.mtp_losses,
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
    """Take all steps of a run, from the start or from its last checkpoint."""
    deadline, save_deadline = (timedelta(seconds=s) for s in (settings.deadline, settings.save_deadline))
    # All ranks wait while a group is made, and the watchdog does not count that: each group has its own phase.
    watchdog.phase("making the mesh")
    parallel = ParallelMesh.make(settings.dims, device.type, timeout_of_groups(deadline))
    watchdog.follow(*map(collectives_begun, parallel.groups))
    watchdog.phase("making a group to save over")
    save_group = dist.new_group(timeout=timeout_of_groups(max(deadline, save_deadline)))
    watchdog.phase("setting up")
    watchdog.follow(collectives_begun(save_group))
    run = Run(settings, device, parallel, save_group, watchdog.phase)
    timed = run.timed
    watchdog.follow(lambda: timed.begun)  # no group counts the messages of rolls in the same way on all ranks
    if settings.resume:
        watchdog.phase("loading a checkpoint", save_deadline)
        run.load()
    writes = dist.get_rank() == 0
    log = StepLog(settings.folder / LOG, run.steps_done) if writes else None
    if writes:
        options = {
            name: value for name, value in asdict(settings).items() if name not in ("out", "data", "curves")
        }
        where = describe(device, dist.get_world_size())
        facts = {"settings": options, "identity": run.identity, "where": where}
        (settings.folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    steps, console = settings.steps, Console(quiet=not writes, soft_wrap=True, highlight=False)
    every = max(1, steps // LINES)
    console.print(run.introduction)
    if log is not None and log.missing:
        console.print(f"{log.path} lacks {log.missing} of the steps that the checkpoint holds")
    with progress_bar(console) as progress:
        task = progress.add_task("", total=steps, completed=run.steps_done)
        while run.steps_done < steps:
            watchdog.phase(f"step {run.steps_done + 1}: batches")
            record = run.step()
            if log is not None:
                log.write(record)
            progress.update(task, completed=run.steps_done, description=line_of(record))
            if not console.is_terminal and run.steps_done % every == 0:
                console.print(f"{run.steps_done}/{steps} {line_of(record)}")
            if run.steps_done == steps or (settings.save_every and run.steps_done % settings.save_every == 0):
                watchdog.phase(f"saving step {run.steps_done}", save_deadline)
                if log is not None:
                    log.sync()
                run.save()
    watchdog.phase("drawing the losses")
    run.model.mtp.roller.close()
    if log is not None:
        log.close()
        written = [str(log.path)]
        if log.path.stat().st_size:
            draw_losses([settings.folder], settings.folder)
            written.append("losses.png")
        console.print(f"wrote {', '.join(written)} and checkpoints, the last of step {run.steps_done}")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: by torch on a GPU, else by this process (Linux counts them in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def progress_bar(console: Console) -> Progress:
    """Return a bar of steps that shows the last record; it stays hidden if there is no terminal."""
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


def line_of(record: dict[str, Any]) -> str:
    """Return a step's record as one line."""

    def joined(values: list[float | None], form: str) -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    parts = [f"LM {joined([record['lm_loss']], '.3f')}", f"MTP {joined(record['mtp_losses'], '.3f')}"]
    if record["aux_loss"] is not None:
        parts.append(f"aux {record['aux_loss']:.3f}")
    parts += [f"accepted {joined(record['acceptance'], '.0%')}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    if record["stall_us"] is not None:
        parts.append(f"stall {record['stall_us']:.0f} µs")
    return ", ".join([*parts, f"{record['memory_gib']:.1f} GiB"])
