"""Training steps of one model under several schedules, in interleaved rounds, on real text."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

from compare.steps import CapturedStep, EagerStep
from harness import environment, statistics
from harness.command import Words, check_least
from harness.profiler import recording
from overlap_mtp import SCHEDULES, SequenceLayout, make_roller, prepare
from overlap_mtp.exchange.select import TRANSPORTS
from overlap_mtp.layout import Kind
from overlap_mtp.model.config import ModelConfig
from overlap_mtp.model.gpt import GPT
from overlap_mtp.schedules.roller import Rolls
from overlap_mtp.schedules.timed import Cost
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
    """Schedules; `prefetch:process_group` names a transport too. `prepared`, the baseline, always runs."""
    layout: Kind = "zigzag"
    """How tokens are dealt to ranks."""
    transport: str = "auto"
    """Transport of the modes that name none."""
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False
    """Compile the layers."""
    captured: Annotated[bool, tyro.conf.arg(name="graph")] = False
    """Replay steps as CUDA graphs; needs dense batches and GPUs."""
    profile: Literal["nsys", "torch"] | None = None
    """nsys: start and stop its capture; torch: write traces."""
    profile_out: Path = Path("out/profile")
    """Folder of the traces of --profile torch."""
    rounds: int = 40
    """Timed rounds."""
    warmup: int = 5
    """Rounds before them."""
    data: Path | None = None
    """Text file, folder, or .bin of token ids; by default the standard library's source."""
    token_dtype: str = "uint16"
    """Type of the ids in a .bin: uint16 or uint32."""

    def check(self, problem: Problem, on_gpu: bool) -> None:
        """Raise ValueError for options that are illegal or do not go together."""
        check_least(self, rounds=2, warmup=1)
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        for mode in self.modes:
            schedule, _, transport = mode.partition(":")
            if schedule not in ALL_MODES or transport not in ("", *TRANSPORTS):
                raise ValueError(
                    f"modes must be among {', '.join(ALL_MODES)}, each alone or followed by a transport "
                    f"(:process_group or :symmetric), got {mode!r}"
                )
        if not on_gpu and (self.captured or self.profile or self.transport == "symmetric"):
            raise ValueError("--graph, --profile and --transport symmetric need GPUs")
        if self.captured and problem.num_documents is not None:
            raise ValueError("--graph needs --documents dense: the layout of a captured step is fixed")


@dataclass(frozen=True)
class RoundInputs:
    """What all steps of a round compute on: this rank's shards, without and with the rolls of `prepared`."""

    plain: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]
    layout: SequenceLayout
    counts: torch.Tensor
    expected: Rolls


@dataclass
class Step:
    """What one timed step gave, on this rank."""

    ms: float
    cost: Cost
    messages: int
    bytes: int
    loss: torch.Tensor
    rolls_equal: bool


def open_stream(problem: Problem, settings: Settings, ranks: int) -> BatchStream:
    """Open the batches of a comparison.

    Args:
        problem: the sizes of a batch.
        settings: the text and the layout.
        ranks: how many ranks share a sequence.

    Raises:
        ValueError: the sizes or the text are illegal.
    """
    return BatchStream(
        open_corpus(settings.data, settings.token_dtype),
        problem.seq_len,
        problem.batch_size,
        ranks,
        settings.layout,
        problem.model.vocab_size,
        problem.num_documents,
    )


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
        roller = make_roller(
            schedule,
            self.group,
            self.problem.model.num_depths,
            transport or self.settings.transport,
            self.problem.max_documents,
        )
        kind = CapturedStep if self.settings.captured else EagerStep
        return kind(self.model, roller, self.problem.forward_only)

    def run(self, on_round: Callable[[], None]) -> dict[str, Any] | None:
        """Run all rounds, call `on_round` after each, and return the record on rank 0."""
        settings = self.settings
        steps: dict[str, list[Step]] = {mode: [] for mode in self.steps}
        gc.disable()  # a collection inside a step would be counted as the schedule's
        # The recording begins with the warm-up: a profiler sees into a CUDA graph only if it saw its capture.
        with recording(settings.profile, settings.profile_out, self.rank):
            for index in range(settings.warmup + settings.rounds):
                kept = index >= settings.warmup
                for mode, step in self._round(index, kept).items():
                    if kept:
                        steps[mode].append(step)
                on_round()
                gc.collect()
        gc.enable()
        for one in self.steps.values():
            one.close()
        return self._summary(steps)

    def _round(self, index: int, kept: bool) -> dict[str, Step]:
        """Run one step of every schedule on the same weights and batch, then one update.

        Steps are named in profiles if they are `kept`.
        """
        inputs = self._inputs(index)
        # The order is the same on all ranks and changes each round: a step after a slow `sync` finds a cooler,
        # faster GPU.
        order = np.random.default_rng((SEED, index)).permutation(list(self.steps))
        self._step(BASELINE, inputs, named=False)  # discarded: the first step after an update is faster
        steps, gradients = {}, None
        for mode in order.tolist():
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
        traffic = step.timed.roller.traffic
        before = replace(traffic)
        self.optimizer.zero_grad()
        new_layout = replace(inputs.layout, _positions={})  # no schedule profits from what another one cached
        step.load(inputs.prepared if mode == BASELINE else inputs.plain, new_layout, inputs.counts)
        self._meet()
        begin = time.perf_counter()
        with span("step", mode) if named else contextlib.nullcontext():
            loss = step.run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - begin)
        equal = all(
            torch.equal(step.rolls.at(depth)[name], wanted)
            for depth in range(1, self.problem.model.num_depths + 1)
            for name, wanted in inputs.expected.at(depth).items()
        )
        cost, sent = step.timed.read(), (traffic.messages - before.messages, traffic.bytes - before.bytes)
        return Step(ms, cost, *sent, loss.clone(), equal)

    def _meet(self) -> None:
        """Wait until the devices of all ranks are idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _summary(self, steps: dict[str, list[Step]]) -> dict[str, Any] | None:
        """Gather all ranks' steps and return the record on rank 0. The slowest rank's time is the step's."""
        losses = {mode: torch.stack([step.loss for step in steps[mode]]).double() for mode in steps}
        for one in losses.values():
            dist.all_reduce(one, group=self.group)
        mine = {mode: [_numbers(step) for step in steps[mode]] for mode in steps}
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine, group=self.group)
        if self.rank:
            return None
        # By mode: [ranks, rounds].
        table = {
            mode: np.moveaxis(np.array([ranks[mode] for ranks in everyone], np.float64), 2, 0)
            for mode in steps
        }
        times = {mode: ms.max(0) for mode, (ms, *_) in table.items()}
        compared = statistics.compare(times, BASELINE, "sync" if "sync" in steps else None, SEED)
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


def _numbers(step: Step) -> tuple[float, ...]:
    cost = step.cost
    stall_us = math.nan if cost.stall_us is None else cost.stall_us
    return step.ms, cost.host_us, stall_us, step.messages, step.bytes, step.rolls_equal
