"""Training steps of one model under several schedules, in interleaved rounds, on real text."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console

from compare.steps import ActivationStep, CapturedStep, EagerStep, Rolled, Spent, TimedActivations
from harness import environment, statistics
from harness.command import Words, check_least, check_out, default_is
from harness.rounds import gather, interleaved, meet, recording, synchronize
from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare
from overlap_mtp.layout import Kind
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules.activations import ACTIVATION_SCHEDULES
from overlap_mtp.schedules.packed import PACKED_SCHEDULES
from overlap_mtp.schedules.roller import Roller
from overlap_mtp.tracing import span
from overlap_mtp.training.data import BatchStream, open_corpus
from overlap_mtp.training.trainer import global_counts, reduce_gradients

TIMING_ONLY = "none"
SEED = 0
Gradients = list[torch.Tensor | None]


@dataclass(frozen=True)
class Problem:
    """What a step computes. `seq_len` counts the tokens of the whole sequence, over all ranks."""

    model: ModelConfig
    seq_len: int
    batch_size: int
    num_documents: int | None  # None: dense
    forward_only: bool

    @property
    def max_documents(self) -> int:
        """How many documents messages are sized for: the default of make_roller, or more if the batch has more."""
        return max(128, self.num_documents or 1)


class Contest(NamedTuple):
    """What is compared with what."""

    modes: tuple[str, ...]  # all there are
    baseline: str  # whose steps have no exchange
    reference: str  # whose bits are right
    merging: str  # the schedule whose messages block, as those of `sync`, but are as few as possible
    overlapped: str  # the schedule that is to hide the exchange
    transports: tuple[str, ...]  # that a mode can name


OVER = ("process_group", "symmetric")
TOKENS = Contest((*SCHEDULES, TIMING_ONLY), "prepared", "prepared", "batched", "prefetch", OVER)
# Nobody can prepare activations. Tokens are prepared then.
ACTIVATIONS = Contest((*ACTIVATION_SCHEDULES, TIMING_ONLY), TIMING_ONLY, "merged", "merged", "overlap", OVER)


def contest_of(model: ModelConfig) -> Contest:
    """Return what a model's schedules are compared with."""
    return ACTIVATIONS if model.rolls_activations else TOKENS


@dataclass(frozen=True)
class Settings:
    """How the schedules are timed."""

    modes: Annotated[Words | None, default_is("all")] = None
    """Schedules to time, with a transport too as in `prefetch:process_group`. `prepared`, the baseline, always runs.
    `none` does not roll: its step is one without any exchange, on wrong tokens, so only its time counts. If the model
    rolls activations, these are their schedules, and `none` is the baseline."""
    transport: Literal["auto", "process_group", "symmetric"] = "auto"
    """Transport of the modes that name no transport."""
    layout: Kind = "zigzag"
    """How tokens are dealt to ranks."""
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False
    """Compile the layers."""
    captured: Annotated[bool, tyro.conf.arg(name="graph")] = False
    """Replay steps as CUDA graphs; needs --documents 0 and GPUs."""
    profile: Annotated[Literal["nsys", "torch"] | None, default_is("no profile")] = None
    """Record the rounds. nsys: start and stop its capture; torch: write traces."""
    profile_out: Path = Path("out/profile")
    """Folder of the traces of --profile torch."""
    rounds: int = 40
    """Timed rounds."""
    warmup: int = 5
    """Rounds before them, which are not timed."""
    data: Annotated[Path | None, default_is("the source of Python's library")] = None
    """Text to compute on: a text file, token ids (.bin, also of llm.c, or a 1-D .npy), or a folder of such files."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of the ids in a .bin."""

    def check(self, problem: Problem, on_gpu: bool) -> None:
        """Raise ValueError for options that are illegal or do not go together."""
        check_least(self, rounds=2, warmup=1)
        contest = contest_of(problem.model)
        legal, baseline, transports = contest.modes, contest.baseline, contest.transports
        modes = self.chosen_modes(problem)
        for mode in modes:
            schedule, _, transport = mode.partition(":")
            if schedule not in legal or transport not in ("", *transports):
                followed = (
                    f", each alone or followed by a transport ({' or '.join(f':{t}' for t in transports)})"
                )
                raise ValueError(
                    f"modes must be among {', '.join(legal)}{followed if transports else ''}, got {mode!r}"
                )
            if transport and not (problem.model.rolls_activations or schedule in PACKED_SCHEDULES):
                raise ValueError(f"{schedule} has no transport to choose, got {mode!r}")
            if transport and schedule == TIMING_ONLY:
                raise ValueError(f"{TIMING_ONLY} sends nothing: it has no transport, got {mode!r}")
        if not {*modes} - {baseline}:
            raise ValueError(f"modes must name a schedule to compare with {baseline}, got {baseline!r} alone")
        if problem.model.rolls_activations and any(
            mode.endswith(":symmetric") and not mode.startswith(contest.overlapped) for mode in modes
        ):
            raise ValueError(f"of activations, only {contest.overlapped} runs over :symmetric")
        if self.captured and problem.model.rolls_activations:
            raise ValueError("--graph and rolls of activations do not go together")
        symmetric = any(one.endswith(":symmetric") for one in (*modes, f":{self.transport}"))
        if (self.captured or self.profile or symmetric) and not on_gpu:
            raise ValueError("--graph, --profile and modes over :symmetric need GPUs")
        if self.captured and problem.num_documents is not None:
            raise ValueError("--graph needs --documents 0: the layout of a captured step is fixed")

    def chosen_modes(self, problem: Problem) -> tuple[str, ...]:
        """Return the schedules to time, with the baseline and the reference."""
        contest = contest_of(problem.model)
        chosen = contest.modes if self.modes is None else self.modes
        return tuple(dict.fromkeys((*chosen, contest.baseline, contest.reference)))

    def check_profile_out(self) -> None:
        """Make the folder of traces, if there will be any. Raise ValueError if it cannot be written to."""
        if self.profile == "torch":
            check_out(self.profile_out)


Timing = Annotated[Settings, tyro.conf.arg(name="timing")]  # the title of their group


@dataclass(frozen=True)
class RoundInputs:
    """What all steps of a round compute on: this rank's shards, without and with the rolls of `prepared`."""

    plain: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]
    layout: SequenceLayout
    counts: torch.Tensor


class Step(NamedTuple):
    """What one timed step gave, on this rank."""

    ms: float
    spent: Spent
    rolls_equal: bool
    gradients_equal: bool  # True where they are not compared
    loss: torch.Tensor


def open_stream(problem: Problem, settings: Settings, ranks: int) -> BatchStream:
    """Open the batches of a comparison on some ranks. Raise ValueError if the sizes or the text are illegal."""
    corpus, sizes = open_corpus(settings.data, settings.token_dtype), (problem.seq_len, problem.batch_size)
    vocab_size, documents = problem.model.vocab_size, problem.num_documents
    return BatchStream(corpus, *sizes, ranks, settings.layout, vocab_size, documents)


class Comparison:
    """The model, the rollers and the batches of one comparison on one rank."""

    def __init__(self, problem: Problem, settings: Settings, device: torch.device) -> None:
        self.problem, self.settings, self.device = problem, settings, device
        self.group = dist.group.WORLD
        assert self.group is not None
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.stream = open_stream(problem, settings, self.ranks)
        torch.manual_seed(SEED)
        with device:
            self.model = GPT(problem.model, self.group)
        if device.type == "cuda":
            self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        if settings.compiled:
            self.model.compile_layers()
        self.contest = contest_of(problem.model)
        self.steps = {mode: self._make_step(mode) for mode in settings.chosen_modes(problem)}

    def _make_step(self, mode: str) -> EagerStep:
        problem = self.problem
        schedule, _, transport = mode.partition(":")
        if problem.model.rolls_activations:
            transport = transport or self.settings.transport
            activations = TimedActivations(schedule, self.group, problem.max_documents, transport)
            return ActivationStep(self.model, self._roller("prepared"), problem.forward_only, activations)
        kind = CapturedStep if self.settings.captured else EagerStep
        return kind(self.model, self._roller(schedule, transport), problem.forward_only)

    def _roller(self, schedule: str, transport: str = "") -> Roller:
        depths, transport = self.problem.model.num_depths, transport or self.settings.transport
        return make_roller(schedule, self.group, depths, transport, self.problem.max_documents)

    def run(self, console: Console) -> dict[str, Any] | None:
        """Run all rounds, show progress on a console, and return the record on rank 0."""
        settings, title = self.settings, f"rounds of {', '.join(self.steps)}"
        rounds = interleaved(list(self.steps), settings.warmup + settings.rounds, SEED, title, console)
        steps: dict[str, list[Step]] = {mode: [] for mode in self.steps}
        # The recording begins with the warm-up: a profiler sees into a CUDA graph only if it saw its capture.
        with recording(settings.profile, settings.profile_out, self.rank):
            for index, order in rounds:
                kept = index >= settings.warmup
                for mode, step in self._round(index, order, kept).items():
                    if kept:
                        steps[mode].append(step)
        for one in self.steps.values():
            one.close()
        return self._summary(steps)

    def _round(self, index: int, order: list[str], kept: bool) -> dict[str, Step]:
        """Run one step of every schedule on the same weights and batch, then one update.

        Steps are named in profiles if they are `kept`.
        """
        inputs, reference = self._inputs(index), self.contest.reference
        self._step(
            reference, inputs, {}, None, named=False
        )  # discarded: the first step after an update is faster
        expected = self.steps[reference].rolled()
        right = self._gradients() if self._compares_gradients else None
        steps, gradients = {}, None
        for mode in order:
            steps[mode] = self._step(mode, inputs, expected, right, named=kept)
            if mode != TIMING_ONLY:
                gradients = self._gradients()
        if gradients is not None and not self.problem.forward_only:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            reduce_gradients(self.model.parameters(), self.group)
            self.optimizer.step()
        return steps

    def _inputs(self, index: int) -> RoundInputs:
        full, layout = self.stream.batch(index)
        num_depths = self.problem.model.num_depths
        everything = prepare(full, layout, num_depths)
        prepared = {n: layout.shard(t, self.rank).to(self.device) for n, t in everything.items()}
        plain = {name: prepared[name] for name in full}
        counts = global_counts(self.model, [(plain, layout)], self.group)
        return RoundInputs(plain, prepared, layout, counts)

    def _gradients(self) -> Gradients:
        return [parameter.grad for parameter in self.model.parameters()]

    def _step(
        self, mode: str, inputs: RoundInputs, expected: Rolled, right: Gradients | None, named: bool
    ) -> Step:
        step = self.steps[mode]
        # Rounds that are not timed verify that the ranks are in step.
        step.timed.roller.check_layouts = step.timed.roller.name == "sync" and not named
        self.optimizer.zero_grad()
        new_layout = replace(inputs.layout, _positions={})  # no schedule profits from what another one cached
        batch = inputs.prepared if step.timed.roller.name == "prepared" else inputs.plain
        step.load(batch, new_layout, inputs.counts)
        meet(self.device)
        begin = time.perf_counter()
        with span("step", mode) if named else contextlib.nullcontext():
            loss = step.run()
            synchronize(self.device)
        ms = 1000 * (time.perf_counter() - begin)
        rolled = step.rolled()
        equal = all(torch.equal(rolled[which], wanted) for which, wanted in expected.items())
        gradients_equal = right is None or all(map(_same_bits, right, self._gradients()))
        return Step(ms, step.spent(), equal, gradients_equal, loss.clone())

    @property
    def _compares_gradients(self) -> bool:
        """Whether gradients have the same bits whenever they are right. On GPUs other kernels may add in any order."""
        return self.device.type == "cpu" and not self.problem.forward_only

    def _summary(self, steps: dict[str, list[Step]]) -> dict[str, Any] | None:
        """Gather all ranks' steps and return the record on rank 0. The slowest rank's time is the step's."""
        losses = {mode: torch.stack([step.loss for step in steps[mode]]).double() for mode in steps}
        for one in losses.values():
            dist.all_reduce(one, group=self.group)
        everyone = gather(
            {
                mode: [(one.ms, *one.spent, one.rolls_equal, one.gradients_equal) for one in steps[mode]]
                for mode in steps
            }
        )
        if everyone is None:
            return None
        # By mode: [ranks, rounds].
        table = {
            mode: np.moveaxis(np.array([ranks[mode] for ranks in everyone], np.float64), 2, 0)
            for mode in steps
        }
        times = {mode: ms.max(0) for mode, (ms, *_) in table.items()}
        worst = next((mode for mode in steps if mode.partition(":")[0] == "sync"), None)
        compared = statistics.compare(times, self.contest.baseline, worst, SEED)
        rows = {}
        for mode, (_, *costs, messages, sent_bytes, equal, gradients_equal) in table.items():
            tokens = self.problem.batch_size * self.problem.seq_len
            host_us, stall_us, backward_host_us, backward_stall_us = (one.max(0) for one in costs)
            rows[mode] = {
                **asdict(compared[mode]),
                "tokens_per_s": 1000 * tokens / compared[mode].median_ms,
                "host_us": _known(host_us),
                "stall_us": _median(stall_us),
                "messages_per_step": float(messages.sum(0).mean()),
                "bytes_per_step": float(sent_bytes.sum(0).mean()),
                "loss": float(losses[mode][-1]),
                "rolls_equal": bool(equal.all()),
                "loss_equal": bool(torch.equal(losses[mode], losses[self.contest.reference])),
            }
            if self._compares_gradients:
                rows[mode]["gradients_equal"] = bool(gradients_equal.all())
            if self.problem.model.rolls_activations:
                rows[mode] |= {
                    "exchanges_per_step": len(self.steps[mode].compared),
                    "backward_host_us": _known(backward_host_us),
                    "backward_stall_us": _median(backward_stall_us),
                }
        return {
            "experiment": "compare_modes",
            "command": environment.command(),
            "where": environment.describe(self.device, self.ranks),
            "transport": {
                mode: "" if mode == TIMING_ONLY else step.compared[0].roller.transport
                for mode, step in self.steps.items()
            },
            "settings": self._recorded_settings(),
            "rows": rows,
            "times_ms": {mode: [round(float(t), 4) for t in times[mode]] for mode in times},
        }

    def _recorded_settings(self) -> dict[str, Any]:
        """Return problem and settings for the record, without any path."""
        data = self.settings.data
        return {
            **asdict(self.problem),
            "max_documents": self.problem.max_documents,
            **asdict(self.settings),
            "profile_out": None,
            "modes": list(self.steps),
            "data": "standard library" if data is None else data.name,
        }


def _known(times_us: statistics.Times) -> float | None:
    """Return the median, or None if they were not measured."""
    return None if np.isnan(times_us).any() else float(np.median(times_us))


def _same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _median(stalls_us: statistics.Times) -> dict[str, float] | None:
    """Return the median of each round's stall with its interval, or None if they were not measured."""
    return None if np.isnan(stalls_us).any() else asdict(statistics.median(stalls_us, SEED))
