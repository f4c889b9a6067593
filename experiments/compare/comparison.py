"""Training steps of one model under several schedules, in interleaved rounds, on real text."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from compare.steps import CapturedStep, EagerStep
from harness import environment, statistics
from harness.profiler import recording
from overlap_mtp import SequenceLayout, make_roller, prepare
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


@dataclass(frozen=True)
class Settings:
    """One comparison. `seq_len` is the whole sequence's, over all ranks."""

    model: ModelConfig
    modes: tuple[str, ...]
    seq_len: int
    batch_size: int
    layout: Kind
    num_documents: int | None  # None: dense
    max_documents: int
    forward_only: bool
    rounds: int
    warmup: int
    data: Path | None
    token_dtype: str
    transport: str = "auto"
    compiled: bool = False
    captured: bool = False
    profile: Path | None = None  # where traces of torch.profiler go
    profile_nsys: bool = False
    seed: int = 0


@dataclass(frozen=True)
class RoundInputs:
    """What all steps of a round compute on: this rank's shards, without and with the rolls of `prepared`."""

    plain: dict[str, torch.Tensor]
    prepared: dict[str, torch.Tensor]
    layout: SequenceLayout
    counts: torch.Tensor
    expected: Rolls


def schedule_of(mode: str) -> str:
    """The schedule of a mode: "prefetch" of "prefetch:process_group" too."""
    return mode.partition(":")[0]


def transport_of(mode: str, settings: Settings) -> str:
    """The transport that a mode names, or the comparison's."""
    return mode.partition(":")[2] or settings.transport


def stall_estimate(samples: statistics.Times, seed: int) -> dict[str, float] | None:
    """The median of what the timed read, where it could."""
    return None if np.isnan(samples).any() else asdict(statistics.median(samples, seed))


@dataclass
class Step:
    """What one timed step gave, on this rank."""

    ms: float
    cost: Cost
    messages: int
    bytes: int
    loss: torch.Tensor
    rolls_equal: bool


def open_stream(settings: Settings, ranks: int) -> BatchStream:
    """The batches of a comparison; raises ValueError where sizes or data are illegal."""
    return BatchStream(
        open_corpus(settings.data, settings.token_dtype),
        settings.seq_len,
        settings.batch_size,
        ranks,
        settings.layout,
        settings.model.vocab_size,
        settings.num_documents,
    )


class Comparison:
    """The model, the rollers and the batches of one comparison on one rank."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.group = dist.group.WORLD
        assert self.group is not None
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self.stream = open_stream(settings, self.ranks)
        torch.manual_seed(settings.seed)
        with device:
            self.model = GPT(settings.model, self.group)
        if device.type == "cuda":
            self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        if settings.compiled:
            self.model.compile_layers()
        kind = CapturedStep if settings.captured else EagerStep
        depths, documents = settings.model.num_depths, settings.max_documents
        self.steps = {
            mode: kind(
                self.model,
                make_roller(schedule_of(mode), self.group, depths, transport_of(mode, settings), documents),
                settings.forward_only,
            )
            for mode in settings.modes
        }

    def run(self, on_round: Callable[[], None]) -> dict[str, Any] | None:
        """All rounds; the record on rank 0. `on_round` is called after each."""
        steps: dict[str, list[Step]] = {mode: [] for mode in self.settings.modes}
        gc.disable()  # a collection inside a step would be counted as the schedule's
        # From the first warm-up on: a profiler sees the inside of those CUDA graphs only whose capture it saw.
        with recording(self.settings.profile_nsys, self.settings.profile, self.rank):
            for index in range(self.settings.warmup + self.settings.rounds):
                kept = index >= self.settings.warmup
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
        """One step of every schedule on the same weights and batch, then one update. `kept`: named in profiles."""
        inputs = self._inputs(index)
        # Another order each round, alike on all ranks: a step behind a slow `sync` finds a cooler, faster GPU.
        order = np.random.default_rng((self.settings.seed, index)).permutation(self.settings.modes)
        self._step(BASELINE, inputs, named=False)  # not kept: the first step behind an update is faster
        steps, gradients = {}, None
        for mode in order.tolist():
            steps[mode] = self._step(mode, inputs, named=kept)
            if mode != TIMING_ONLY:
                gradients = [p.grad for p in self.model.parameters()]
        if gradients is not None and not self.settings.forward_only:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            reduce_gradients(self.model.parameters(), self.group)
            self.optimizer.step()
        return steps

    def _inputs(self, index: int) -> RoundInputs:
        full, layout = self.stream.batch(index)
        everything = prepare(full, layout, self.settings.model.num_depths)
        prepared = {n: layout.shard(t, self.rank).to(self.device) for n, t in everything.items()}
        plain = {name: prepared[name] for name in full}
        counts = global_counts(self.model, [(plain, layout)], self.group)
        expected = make_roller(BASELINE, self.group, self.settings.model.num_depths).start(prepared, layout)
        return RoundInputs(plain, prepared, layout, counts, expected)

    def _step(self, mode: str, inputs: RoundInputs, named: bool) -> Step:
        step = self.steps[mode]
        traffic = step.timed.roller.traffic
        before = replace(traffic)
        self.optimizer.zero_grad()
        anew = replace(inputs.layout, _positions={})  # each schedule finds the batch's layout new
        step.load(inputs.prepared if mode == BASELINE else inputs.plain, anew, inputs.counts)
        self._meet()
        begin = time.perf_counter()
        with span("step", mode) if named else contextlib.nullcontext():
            loss = step.run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - begin)
        equal = all(
            torch.equal(step.rolls.at(depth)[name], wanted)
            for depth in range(1, self.settings.model.num_depths + 1)
            for name, wanted in inputs.expected.at(depth).items()
        )
        cost, sent = step.timed.read(), (traffic.messages - before.messages, traffic.bytes - before.bytes)
        return Step(ms, cost, *sent, loss.clone(), equal)

    def _meet(self) -> None:
        """All ranks, with idle devices, at one workload."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _summary(self, steps: dict[str, list[Step]]) -> dict[str, Any] | None:
        """Gathers all ranks' steps; a step takes as long as it does on its slowest rank."""
        losses = {mode: torch.stack([step.loss for step in steps[mode]]).double() for mode in steps}
        for one in losses.values():
            dist.all_reduce(one, group=self.group)
        mine = {
            mode: [
                (s.ms, s.cost.host_us, s.messages, s.bytes, s.rolls_equal, _number(s.cost.stall_us))
                for s in steps[mode]
            ]
            for mode in steps
        }
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine, group=self.group)
        if self.rank:
            return None
        table = {mode: np.array([ranks[mode] for ranks in everyone], dtype=np.float64) for mode in steps}
        times = {mode: table[mode][:, :, 0].max(0) for mode in steps}
        sync = "sync" if "sync" in steps else None
        compared = statistics.compare(times, BASELINE, sync, self.settings.seed)
        rows = {}
        for mode in steps:
            rows[mode] = {
                **asdict(compared[mode]),
                "tokens_per_s": self.settings.batch_size
                * self.settings.seq_len
                / compared[mode].median_ms
                * 1000,
                "host_us": float(np.median(table[mode][:, :, 1].max(0))),
                "stall_us": stall_estimate(table[mode][:, :, 5].max(0), self.settings.seed),
                "messages_per_step": float(table[mode][:, :, 2].sum(0).mean()),
                "bytes_per_step": float(table[mode][:, :, 3].sum(0).mean()),
                "loss": float(losses[mode][-1]),
                "rolls_equal": bool(table[mode][:, :, 4].all()),
                "loss_equal": bool(torch.equal(losses[mode], losses[BASELINE])),
            }
        settings = asdict(self.settings)
        settings["data"] = "standard library" if self.settings.data is None else self.settings.data.name
        settings["profile"] = None
        return {
            "experiment": "compare_modes",
            "where": environment.describe(self.device, self.ranks),
            "transport": {mode: step.timed.roller.transport for mode, step in self.steps.items()},
            "settings": settings,
            "rows": rows,
            "times_ms": {mode: [round(float(t), 4) for t in times[mode]] for mode in times},
        }


def _number(value: float | None) -> float:
    return math.nan if value is None else value
