"""Steps of Megatron-LM's model under all modes, in interleaved rounds."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dropin.batches import Batch
from dropin.model import MegatronModel
from dropin.modes import BASELINE, has_host_bounds
from dropin.subject import Subject
from harness import statistics
from harness.rounds import gather, interleaved, meet, synchronize
from overlap_mtp.tracing import span

CLOCKS = ("events_ms", "wall_ms")
LEAST_ROUNDS = 5  # that are kept, however late it is
ROUND_SEED = 1000  # of the first round's batch


@dataclass(frozen=True)
class Rounds:
    """How steps are timed."""

    count: int
    warmup: int
    microbatches: int  # of a step, back to back
    limit_s: float  # then the rounds end


def time_modes(
    subject: Subject,
    modes: list[str],
    documents: int,
    rounds: Rounds,
    recorded: contextlib.AbstractContextManager[None],
) -> dict[str, Any] | None:
    """Run rounds of all modes on the same weights; each round has a batch of its own. Collective.

    A round runs all modes once in its order and, after a pause like the first, once in the reverse of it. It keeps the
    mean of the two. A step that does not count comes first each time. A step after a pause, or after a slow one, finds
    a cooler GPU and is up to 8 % faster, so each mode must stand as often in each place. The rounds that are kept run
    within `recorded`.

    Returns:
        On rank 0: `rounds`, how many were kept; `times_ms` of the slowest rank, {clock: {mode: [ms]}}; and `rows`,
        {clock: {mode: its harness.statistics.Comparison with the baseline}}. There are no `events_ms` on the CPU.
        None on the other ranks.
    """
    mine: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    title = f"rounds of {', '.join(modes)}"
    deadline = time.perf_counter() + rounds.limit_s
    order_seed = documents
    all_rounds = interleaved(modes, rounds.warmup + rounds.count, order_seed, title, subject.console)
    with contextlib.ExitStack() as recording:
        for index, order in all_rounds:
            if _is_over(deadline, subject.device) and index >= rounds.warmup + LEAST_ROUNDS:
                break
            if index == rounds.warmup:
                recording.enter_context(recorded)
            kept = index >= rounds.warmup
            measured: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
            for half in (order, order[::-1]):
                gc.collect()
                batch = subject.batch(documents, ROUND_SEED + index)
                for at, mode in enumerate([BASELINE, *half]):
                    subject.switch.to(mode)
                    times = _time_step(subject.model, batch, mode, rounds.microbatches, kept and at > 0)
                    if at > 0:
                        measured[mode].append(times)
            if kept:
                for mode, (first, second) in measured.items():
                    mine[mode].append(((first[0] + second[0]) / 2, (first[1] + second[1]) / 2))
    everyone = gather(mine)
    return None if everyone is None else _summary(everyone, modes, subject.device)


def _is_over(deadline: float, device: torch.device) -> bool:
    """Return whether rank 0's clock is past the deadline: the same on all ranks."""
    over = torch.tensor([time.perf_counter() > deadline], device=device, dtype=torch.int32)
    dist.broadcast(over, 0)
    return bool(over.item())


def _time_step(
    model: MegatronModel, batch: Batch, mode: str, microbatches: int, named: bool
) -> tuple[float, float]:
    """Return this rank's ms by CUDA events (NaN on the CPU) and by the host's clock. `named`: in profiles."""
    parameters = [batch.packed_seq_params(has_host_bounds(mode)) for _ in range(microbatches)]
    model.load(batch)
    meet(batch.device)
    events = [_event() for _ in range(2)] if batch.device.type == "cuda" else []
    start = time.perf_counter()
    with span("step", mode) if named else contextlib.nullcontext():
        for event in events[:1]:
            event.record()
        for one in parameters:
            model.loss(batch, one).backward()  # type: ignore[no-untyped-call]
        for event in events[1:]:
            event.record()
        synchronize(batch.device)
    wall_ms = 1000 * (time.perf_counter() - start)
    return (events[0].elapsed_time(events[1]) if events else float("nan")), wall_ms


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _summary(
    everyone: list[dict[str, list[tuple[float, float]]]], modes: list[str], device: torch.device
) -> dict[str, Any]:
    slowest = {
        mode: np.array([ranks[mode] for ranks in everyone]).max(0).T for mode in modes
    }  # [clocks, rounds]
    times: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for index, clock in enumerate(CLOCKS):
        if clock == "events_ms" and device.type != "cuda":
            continue
        of_clock = {mode: slowest[mode][index] for mode in modes}
        compared = statistics.compare(of_clock, BASELINE, None)
        rows[clock] = {mode: asdict(one) for mode, one in compared.items()}
        times[clock] = {mode: [round(float(ms), 4) for ms in of_clock[mode]] for mode in modes}
    return {"rounds": len(everyone[0][modes[0]]), "rows": rows, "times_ms": times}
