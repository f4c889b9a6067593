"""Training steps of one model under several schedules, in interleaved rounds, on real text."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console

from compare.steps import CapturedStep, EagerStep
from harness import environment, statistics
from harness.command import Words, check_least, check_out, default_is
from harness.rounds import gather, interleaved, meet, recording, synchronize
from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare
from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.layout import Kind
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules.roller import Rolls
from overlap_mtp.tracing import span
from overlap_mtp.training.data import BatchStream, open_corpus
from overlap_mtp.training.trainer import global_counts, reduce_gradients

BASELINE = "prepared"
TIMING_ONLY = "none"
ALL_MODES = (*SCHEDULES, TIMING_ONLY)
SEED = 0


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


@dataclass(frozen=True)
class Settings:
    """How the schedules are timed."""

    modes: Words = ALL_MODES
    """Schedules to time, with a transport too as in `prefetch:process_group`. `prepared`, the baseline, always runs.
    `none` does not roll: its step is one without any exchange, on wrong tokens, so only its time counts."""
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
        for mode in self.modes:
            schedule, _, transport = mode.partition(":")
            if schedule not in ALL_MODES or transport not in ("", *TRANSPORTS):
                raise ValueError(
                    f"modes must be among {', '.join(ALL_MODES)}, each alone or followed by a transport "
                    f"(:process_group or :symmetric), got {mode!r}"
                )
        if not {*self.modes} - {BASELINE}:
            raise ValueError(f"modes must name a schedule to compare with {BASELINE}, got {BASELINE!r} alone")
        symmetric = any(one.endswith(":symmetric") for one in (*self.modes, f":{self.transport}"))
        if (self.captured or self.profile or symmetric) and not on_gpu:
            raise ValueError("--graph, --profile and modes over :symmetric need GPUs")
        if self.captured and problem.num_documents is not None:
            raise ValueError("--graph needs --documents 0: the layout of a captured step is fixed")

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
    expected: Rolls


class Step(NamedTuple):
    """What one timed step gave, on this rank."""

    ms: float
    host_us: float
    stall_us: float  # NaN on CPU and in captured graphs
    messages: int
    bytes: int
    rolls_equal: bool
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
        self.steps = {mode: self._make_step(mode) for mode in dict.fromkeys((*settings.modes, BASELINE))}

    def _make_step(self, mode: str) -> EagerStep:
        schedule, _, transport = mode.partition(":")
        depths, transport = self.problem.model.num_depths, transport or self.settings.transport
        roller = make_roller(schedule, self.group, depths, transport, self.problem.max_documents)
        kind = CapturedStep if self.settings.captured else EagerStep
        return kind(self.model, roller, self.problem.forward_only)

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
        inputs = self._inputs(index)
        self._step(BASELINE, inputs, named=False)  # discarded: the first step after an update is faster
        steps, gradients = {}, None
        for mode in order:
            steps[mode] = self._step(mode, inputs, named=kept)
            if mode != TIMING_ONLY:
                gradients = [p.grad for p in self.model.parameters()]
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
        expected = make_roller(BASELINE, self.group, num_depths).start(prepared, layout)
        return RoundInputs(plain, prepared, layout, counts, expected)

    def _step(self, mode: str, inputs: RoundInputs, named: bool) -> Step:
        step = self.steps[mode]
        # Rounds that are not timed verify that the ranks are in step.
        step.timed.roller.check_layouts = not named
        traffic = step.timed.roller.traffic
        before = replace(traffic)
        self.optimizer.zero_grad()
        new_layout = replace(inputs.layout, _positions={})  # no schedule profits from what another one cached
        step.load(inputs.prepared if mode == BASELINE else inputs.plain, new_layout, inputs.counts)
        meet(self.device)
        begin = time.perf_counter()
        with span("step", mode) if named else contextlib.nullcontext():
            loss = step.run()
            synchronize(self.device)
        ms = 1000 * (time.perf_counter() - begin)
        equal = all(
            torch.equal(step.rolls.at(depth)[name], wanted)
            for depth in range(1, self.problem.model.num_depths + 1)
            for name, wanted in inputs.expected.at(depth).items()
        )
        cost, sent = step.timed.read(), (traffic.messages - before.messages, traffic.bytes - before.bytes)
        stall_us = math.nan if cost.stall_us is None else cost.stall_us
        return Step(ms, cost.host_us, stall_us, *sent, equal, loss.clone())

    def _summary(self, steps: dict[str, list[Step]]) -> dict[str, Any] | None:
        """Gather all ranks' steps and return the record on rank 0. The slowest rank's time is the step's."""
        losses = {mode: torch.stack([step.loss for step in steps[mode]]).double() for mode in steps}
        for one in losses.values():
            dist.all_reduce(one, group=self.group)
        everyone = gather({mode: [step[:-1] for step in steps[mode]] for mode in steps})
        if everyone is None:
            return None
        # By mode: [ranks, rounds].
        table = {
            mode: np.moveaxis(np.array([ranks[mode] for ranks in everyone], np.float64), 2, 0)
            for mode in steps
        }
        times = {mode: ms.max(0) for mode, (ms, *_) in table.items()}
        worst = next((mode for mode in steps if mode.partition(":")[0] == "sync"), None)
        compared = statistics.compare(times, BASELINE, worst, SEED)
        rows = {}
        for mode, (_, host_us, stall_us, messages, sent_bytes, equal) in table.items():
            tokens = self.problem.batch_size * self.problem.seq_len
            stalls = stall_us.max(0)
            rows[mode] = {
                **asdict(compared[mode]),
                "tokens_per_s": 1000 * tokens / compared[mode].median_ms,
                "host_us": float(np.median(host_us.max(0))),
                "stall_us": None if np.isnan(stalls).any() else asdict(statistics.median(stalls, SEED)),
                "messages_per_step": float(messages.sum(0).mean()),
                "bytes_per_step": float(sent_bytes.sum(0).mean()),
                "loss": float(losses[mode][-1]),
                "rolls_equal": bool(equal.all()),
                "loss_equal": bool(torch.equal(losses[mode], losses[BASELINE])),
            }
        return {
            "experiment": "compare_modes",
            "command": environment.command(),
            "where": environment.describe(self.device, self.ranks),
            "transport": {mode: step.timed.roller.transport for mode, step in self.steps.items()},
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
            **asdict(replace(self.settings, profile=None)),
            "profile_out": None,
            "modes": list(self.steps),
            "data": "standard library" if data is None else data.name,
        }
