"""One training run on one rank: batches, steps, records, checkpoints."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.command import write_record
from harness.environment import describe
from harness.launch import timeout_of_groups
from harness.progress import LINE_EVERY_S
from harness.signals import stop_signal
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules.prepared import prepare
from overlap_mtp.schedules.timed import TimedRoller
from overlap_mtp.tracing import span
from overlap_mtp.training.checkpoint import NoCheckpointError
from overlap_mtp.training.corpus import Corpus
from overlap_mtp.training.flops import PEAK_TFLOPS
from overlap_mtp.training.parallel import ParallelMesh, parallelize
from overlap_mtp.training.same_settings import check_same_on_all_ranks
from overlap_mtp.training.step_log import StepLog
from overlap_mtp.training.trainer import Microbatch, Trainer, shares
from overlap_mtp.training.watchdog import Watchdog, collectives_begun
from training.board import Board
from training.curves import LOG, draw_losses
from training.recorded import RecordedSteps
from training.settings import RunSettings

LINES = 20  # that a run prints at least if there is no terminal for a progress bar
PROGRESS = ("steps_done", "batches_done", "right", "counted")  # what a checkpoint holds of a Run


class Run:
    """The model, optimizer and data of a run on one rank, and its progress."""

    def __init__(
        self,
        settings: RunSettings,
        corpus: Corpus,
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
                max(128, settings.documents),
                settings.activation_schedule,
            )
        model.recompute_layers(settings.recompute)
        self.model = parallelize(model, parallel, torch.bfloat16 if device.type == "cuda" else None)
        if settings.compile:
            self.model.compile_layers()
        config = settings.train_config
        optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.trainer = Trainer(self.model, optimizer, config, parallel, on_phase, settings.seed)
        self.saved = self.model, optimizer, self.trainer.scheduler  # in checkpoints
        self.stream, self.identity = settings.stream(corpus), settings.identity(corpus)
        self.checkpoints = settings.checkpoints(save_group)
        self.timed = TimedRoller(self.model.mtp.roller)
        known = PEAK_TFLOPS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.peak_tflops = settings.peak_tflops or (None if settings.share_gpus else known)
        self.steps_done = 0
        self.batches_done = 0  # by all dp ranks: the next step's data begins here
        self.right = self.counted = [0.0] * (1 + settings.depths)  # of all steps, as in StepReport

    def load(self) -> None:
        """Load the last checkpoint, if there is one. Collective.

        Raises:
            CheckpointError: on all ranks, if the checkpoint is damaged or belongs to another run.
        """
        try:
            progress = self.checkpoints.load(*self.saved, self.identity)
        except NoCheckpointError:
            return
        for name in PROGRESS:
            setattr(self, name, progress[name])
        self.trainer.set_learning_rate()

    def save(self) -> None:
        """Save a checkpoint. Collective."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        self.checkpoints.save(self.steps_done, *self.saved, progress, self.identity)

    @property
    def introduction(self) -> str:
        """The model, the data and the step that the run begins with, for the log."""
        settings, corpus = self.settings, self.stream.corpus
        dims, parameters = settings.dims, sum(one.numel() for one in self.model.parameters())
        schedules = settings.schedule
        if settings.model.rolls_activations:
            schedules += f", activations by {settings.activation_schedule}"
        known = {"experts": settings.experts, "documents": settings.documents}
        lines = [
            f"{parameters / 1e6:,.1f} M parameters, "
            + "".join(f"{count} {name}, " for name, count in known.items() if count)
            + f"{settings.seq_len} tokens a sequence; dp {dims.dp} x cp {dims.cp} x tp {dims.tp}, "
            f"{schedules}; data: {len(corpus.documents):,} documents, {corpus.bounds[-1]:,} tokens, "
            f"which fill {self.stream.filled():.0%} of a sequence"
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
        with span("step", self.settings.schedule):
            report = self.trainer.step(microbatches, self.timed, where, first)
        self.steps_done += 1
        self.right = [a + b for a, b in zip(self.right, report.right, strict=True)]
        self.counted = [a + b for a, b in zip(self.counted, report.counted, strict=True)]
        seconds = time.perf_counter() - begin
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            memory_bytes = torch.cuda.max_memory_allocated()
        else:  # of this process; Linux counts it in KiB
            memory_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tflops = report.flops / seconds / self.settings.dims.world / 1e12
        names = ("loss", "lm_loss", "mtp_losses", "aux_loss", "acceptance", "grad_norms", "tokens")
        return {
            "step": self.steps_done,
            "batches": self.batches_done,
            **{name: getattr(report, name) for name in names},
            "cumulative_acceptance": shares(self.right, self.counted)[1:],
            "learning_rate": rate,
            "tokens_per_s": round(report.tokens / seconds, 1),
            "tflops_per_gpu": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "stall_us": self.timed.read().stall_us,
            "memory_gib": memory_bytes / 2**30,
        }

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


def train_on_rank(device: torch.device, settings: RunSettings, watchdog: Watchdog) -> None:
    """Take all steps of a run, from the start or from its last checkpoint.

    If a signal asks a rank to stop (`stop_signal`), all ranks save the same step and return.
    """
    deadline, save_deadline = (timedelta(seconds=s) for s in (settings.deadline, settings.save_deadline))
    watchdog.phase("comparing the ranks' settings")
    corpus = settings.corpus()
    check_same_on_all_ranks(settings.shared(corpus))
    # All ranks wait while a group is made, and the watchdog does not count that: each group has its own phase.
    watchdog.phase("making the mesh")
    parallel = ParallelMesh.make(settings.dims, device.type, timeout_of_groups(deadline))
    watchdog.follow(*map(collectives_begun, parallel.groups))
    watchdog.phase("making a group to save over")
    save_group = dist.new_group(timeout=timeout_of_groups(max(deadline, save_deadline)))
    watchdog.phase("setting up")
    watchdog.follow(collectives_begun(save_group))
    run = Run(settings, corpus, device, parallel, save_group, watchdog.phase)
    # No group counts the messages of rolls in the same way on all ranks.
    watchdog.follow(lambda: run.timed.begun)
    if settings.resume:
        watchdog.phase("loading a checkpoint", save_deadline)
        run.load()
    ended_by = _signal_to_any(save_group, device)  # while the ranks were started
    log, logs = None, cast(list[StepLog | Board], [])
    if dist.get_rank() == 0:
        log = StepLog(settings.folder / LOG, run.steps_done)
        logs = [
            log,
            *([Board(settings.folder / "tensorboard", run.steps_done)] if settings.tensorboard else []),
        ]
        options = asdict(settings)
        for path in ("out", "data", "curves"):
            del options[path]
        where = describe(device, dist.get_world_size())
        facts = {"settings": options, "identity": run.identity, "where": where}
        write_record(facts, settings.folder / "run.json")
    steps, console = settings.steps, Console(quiet=log is None, soft_wrap=True, highlight=False)
    console.print(run.introduction)
    if log is not None and log.missing:
        console.print(f"{log.path} lacks {log.missing} of the steps that the checkpoint holds")
    missing = log.missing if log is not None else 0
    profile = RecordedSteps(settings, run.steps_done, watchdog, save_group)
    with progress_bar(console) as progress, profile:
        task, said = progress.add_task("", total=steps, completed=run.steps_done), time.monotonic()
        while run.steps_done < steps and not ended_by:
            profile.before(run.steps_done + 1)
            watchdog.phase(f"step {run.steps_done + 1}: batches")
            record = run.step()
            for one in logs:
                one.write(record)
            line = line_of(record, device.type == "cuda" and not settings.share_gpus)
            progress.update(task, completed=run.steps_done, description=line)
            is_line_due = (
                run.steps_done % max(1, steps // LINES) == 0 or time.monotonic() - said > LINE_EVERY_S
            )
            if not console.is_terminal and is_line_due:
                said = time.monotonic()
                console.print(f"{run.steps_done}/{steps} {line}")
            ended_by = _signal_to_any(save_group, device)
            is_due = settings.save_every and run.steps_done % settings.save_every == 0
            if is_due or ended_by or run.steps_done == steps:
                watchdog.phase(f"saving step {run.steps_done}", save_deadline)
                for one in logs:
                    one.sync()
                run.save()
                ended_by = ended_by or _signal_to_any(save_group, device)  # while it saved
    watchdog.phase("drawing the losses")
    run.model.mtp.close()
    for one in logs:
        one.close()
    if log is not None:
        written = [str(log.path)]
        if log.missing > missing:
            console.print(f"{log.path} lacks {log.missing} of the steps: it was deleted during the run")
        if log.path.exists() and log.path.stat().st_size:
            draw_losses([settings.folder], settings.folder)
            written.append("losses.png")
        written += [f"{profile.folder}/rank*.json.gz"] if profile.begun else []
        saved = run.checkpoints.latest()
        checkpoints = f" and checkpoints, the last of step {run.steps_done}" if saved else ""
        console.print(f"wrote {', '.join(written)}{checkpoints}")
        if ended_by and run.steps_done < steps:
            state = f"after step {run.steps_done}, which {saved} holds" if saved else "before step 1"
            name = signal.Signals(ended_by).name
            console.print(f"{name} ended the run {state}: --resume goes on with step {run.steps_done + 1}")


def _signal_to_any(group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Return the signal that asked a rank to stop, or 0; the same on all ranks, so that all stop after one step."""
    number = torch.tensor(stop_signal(), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)


def progress_bar(console: Console) -> Progress:
    """Return a bar of steps that shows the last record; it stays hidden if there is no terminal."""
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


def line_of(record: dict[str, Any], on_gpu: bool) -> str:
    """Return a step's record as one line. `on_gpu`: each rank has a GPU of its own."""

    def joined(values: list[float | None], form: str) -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    parts = [f"LM {joined([record['lm_loss']], '.3f')}", f"MTP {joined(record['mtp_losses'], '.3f')}"]
    if record["aux_loss"] is not None:
        parts.append(f"aux {record['aux_loss']:.3f}")
    parts += [f"accepted {joined(record['acceptance'], '.0%')}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    parts.append(f"{record['tflops_per_gpu']:.3g} TFLOP/s a {'GPU' if on_gpu else 'rank'}")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["stall_us"] is not None:
        parts.append(f"stall {record['stall_us']:.0f} µs")
    return ", ".join([*parts, f"{record['memory_gib']:.1f} GiB"])
