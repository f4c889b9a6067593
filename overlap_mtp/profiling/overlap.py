"""What a profile says about its communication: how long it took, and how much of it lay under compute.

Timeline overlap is |communication and compute| / |communication|, over merged intervals on one device (as in
HolisticTraceAnalysis). It is evidence; the result to quote is overlap efficiency (Flux, arXiv 2406.06858):
E = 1 - ECT_schedule / ECT_sync, where ECT = T_step - T_step(prepared) is what communication adds to a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from overlap_mtp.profiling.classify import DeviceTimeline, Mask, Role, base_name, classify
from overlap_mtp.profiling.intervals import NONE, Ints, covered, length, merge
from overlap_mtp.profiling.trace import UNKNOWN, Profile

EVERYTHING, OUTSIDE = "all", "outside steps"  # stand for a schedule if there is no step
FLOOR, BASELINE, JUDGED = "prepared", "sync", "prefetch"
COMMUNICATION = (Role.EXCHANGE, Role.MODEL)
WAITS_FOR_NOBODY = "pack"  # the range of the exchange whose kernels have no peer


@dataclass(frozen=True)
class Row:
    """The communication of one range on one device; for kind "local" the exchange's own work on the device.

    The numbers are sums over `steps` steps; None means that a number does not apply or is not known. `exposed_us` is
    communication that no compute covers on the device. `peer_wait_us` is how much longer the kernels took than on
    the rank where each took least.
    """

    device: str
    schedule: str
    range: str
    kind: str  # exchange, model (any other communication) or local
    steps: int
    time_us: float
    hidden_us: float | None
    exposed_us: float | None
    hidden_fraction: float | None
    peer_wait_us: float | None
    launches: int
    bytes: int | None


@dataclass(frozen=True)
class Schedule:
    """One schedule over all devices. Fractions are of the time of all devices together, `worst` of one device."""

    name: str
    steps: int
    step_ms: float | None  # median; a step lasts from its first to its last activity, on its slowest device
    exchange_hidden: float | None  # fraction of the ranges `pack` and `send-recv`
    exchange_worst: float | None
    all_hidden: float | None  # fraction of all communication
    all_worst: float | None
    efficiency: float | None  # E; None without `sync` and `prepared` steps


@dataclass(frozen=True)
class Report:
    """What was found in one recording; `notes` says what limits it."""

    sources: tuple[str, ...]
    rows: tuple[Row, ...]
    schedules: tuple[Schedule, ...]
    notes: tuple[str, ...]
    timelines: tuple[DeviceTimeline, ...]

    def judged(self) -> tuple[str, float | None]:
        """Return what `--min-hidden` judges, and its hidden fraction on the worst device (None: there is none).

        That is the exchange of the `prefetch` steps; without step ranges the exchange of the whole profile; without
        any range of this project all communication.
        """
        by_name = {schedule.name: schedule for schedule in self.schedules}
        if not any(timeline.has_ours for timeline in self.timelines):
            return "all communication", by_name[EVERYTHING].all_worst
        if any(timeline.steps for timeline in self.timelines):
            shares = [one.exchange_worst for one in self.schedules if base_name(one.name) == JUDGED]
            found = [share for share in shares if share is not None]
            return f"the exchange in {JUDGED} steps", min(found, default=None)
        return "the exchange", by_name[EVERYTHING].exchange_worst

    def as_json(self) -> dict[str, Any]:
        """Return everything but the activities themselves."""
        what, fraction = self.judged()
        return {
            "sources": list(self.sources),
            "devices": [timeline.label for timeline in self.timelines],
            "judged": {"what": what, "hidden_fraction": fraction},
            "schedules": [asdict(schedule) for schedule in self.schedules],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def report_on(profiles: Sequence[Profile]) -> Report:
    """Report on one recording.

    Args:
        profiles: one or several files (one for each rank). If two of them have a rank in common they count as
            several recordings, and labels name the file.
    """
    groups = [classify(profile) for profile in profiles]
    labels = [timeline.label for group in groups for timeline in group]
    if len(set(labels)) < len(labels):
        groups = [
            [replace(timeline, label=f"{profile.source}: {timeline.label}") for timeline in group]
            for profile, group in zip(profiles, groups, strict=True)
        ]
    else:  # one recording, whose ranks wait for each other
        groups = [[timeline for group in groups for timeline in group]]
    measured = [_Measured(*one) for group in groups for one in zip(group, _peer_waits(group), strict=True)]
    timelines = tuple(one.timeline for one in measured)
    rows = tuple(row for one in measured for row in one.rows())
    notes = tuple(_notes(timelines, rows))
    return Report(tuple(profile.source for profile in profiles), rows, _schedules(measured), notes, timelines)


class _Measured:
    """A timeline, its compute, and which activities belong to the steps of each schedule."""

    def __init__(self, timeline: DeviceTimeline, wait: Ints) -> None:
        self.timeline, self._wait = timeline, wait
        self._compute = merge(*timeline.times(timeline.role == Role.COMPUTE))
        self.is_communication: Mask = np.isin(timeline.role, COMMUNICATION)
        self.steps = Counter(step.schedule for step in timeline.steps)  # in the order of their first steps
        if not self.steps:
            self.schedules = {EVERYTHING: np.ones(timeline.start.size, bool)}
            return
        names = list(self.steps)
        number = np.array([names.index(step.schedule) for step in timeline.steps] + [NONE])[timeline.step]
        self.schedules = {name: number == index for index, name in enumerate(names)}
        if (self.is_communication & (number == NONE)).any():
            self.schedules[OUTSIDE] = number == NONE

    def overlap(self, mask: Mask) -> tuple[int, int]:
        """How long these activities are (merged), and how much of that lies under compute; ns."""
        union = merge(*self.timeline.times(mask))
        return length(union), int(covered(self._compute, *union).sum())

    def rows(self) -> Iterator[Row]:
        for schedule, inside in self.schedules.items():
            for role in (*COMMUNICATION, Role.LOCAL):
                of_role = inside & (self.timeline.role == role)
                for part in dict.fromkeys(self.timeline.part[of_role].tolist()):
                    yield self._row(schedule, role, part, of_role & (self.timeline.part == part))

    def _row(self, schedule: str, role: Role, part: int, mask: Mask) -> Row:
        time, hidden = self.overlap(mask)
        num_bytes, wait = self.timeline.num_bytes[mask], self._wait[mask]
        shared = role != Role.LOCAL
        return Row(
            device=self.timeline.label,
            schedule=schedule,
            range=self.timeline.parts[part],
            kind=role.name.lower(),
            steps=self.steps[schedule],
            time_us=time / 1000,
            hidden_us=hidden / 1000 if shared else None,
            exposed_us=(time - hidden) / 1000 if shared else None,
            hidden_fraction=hidden / time if shared and time else None,
            peer_wait_us=float(wait.sum()) / 1000 if shared and (wait != UNKNOWN).all() else None,
            launches=int(mask.sum()),
            bytes=int(num_bytes[num_bytes != UNKNOWN].sum()) if (num_bytes != UNKNOWN).any() else None,
        )


def _peer_waits(timelines: Sequence[DeviceTimeline]) -> list[Ints]:
    """For each activity of each timeline its duration less that of its shortest participant (ns), or UNKNOWN.

    The n-th communication of a range in a step counts as one and the same on all ranks, if they have equally many
    there. If numbers differ (ranks at the ends of a chain, for example), or only one rank communicates, the wait is
    unknown.
    """
    waits = [np.full(timeline.start.size, UNKNOWN, np.int64) for timeline in timelines]
    everyone: dict[tuple[object, ...], dict[int, list[int]]] = {}
    for number, timeline in enumerate(timelines):
        is_alone = np.array([part == WAITS_FOR_NOBODY for part in timeline.parts])[timeline.part]
        shared = (timeline.role == Role.MODEL) | ((timeline.role == Role.EXCHANGE) & ~is_alone)
        steps = [(step.schedule, step.number) for step in timeline.steps] + [("", NONE)]
        for at in np.flatnonzero(shared).tolist():
            key = (steps[timeline.step[at]], timeline.role[at], timeline.parts[timeline.part[at]])
            everyone.setdefault(key, {}).setdefault(number, []).append(at)
    for members in everyone.values():
        if len(members) < 2 or len({len(each) for each in members.values()}) > 1:
            continue
        durations = {n: timelines[n].end[each] - timelines[n].start[each] for n, each in members.items()}
        shortest = np.min(list(durations.values()), axis=0)
        for n, each in members.items():
            waits[n][each] = durations[n] - shortest
    return waits


def _schedules(measured: Sequence[_Measured]) -> tuple[Schedule, ...]:
    times = _step_times([one.timeline for one in measured])
    found = []
    for name in dict.fromkeys(name for one in measured for name in one.schedules):
        inside = [(one, one.schedules[name]) for one in measured if name in one.schedules]
        exchange = [one.overlap(mask & (one.timeline.role == Role.EXCHANGE)) for one, mask in inside]
        everything = [one.overlap(mask & one.is_communication) for one, mask in inside]
        found.append(
            Schedule(
                name,
                max(one.steps[name] for one, _ in inside),
                median(times[name]) / 1e6 if name in times else None,
                *_fractions(exchange),
                *_fractions(everything),
                _efficiency(times, name),
            )
        )
    return tuple(found)


def _fractions(overlaps: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """The hidden fraction of all devices together and of the worst; None if there is nothing to hide."""
    shares = [hidden / time for time, hidden in overlaps if time]
    if not shares:
        return None, None
    return sum(hidden for _, hidden in overlaps) / sum(time for time, _ in overlaps), min(shares)


def _step_times(timelines: Sequence[DeviceTimeline]) -> dict[str, list[int]]:
    """For each schedule the time of each of its steps, from first to last activity, on the slowest device; ns."""
    slowest: Counter[tuple[str, int]] = Counter()
    for timeline in timelines:
        for at, step in enumerate(timeline.steps):
            start, end = timeline.times(timeline.step == at)
            if start.size:
                key = (step.schedule, step.number)
                slowest[key] = max(slowest[key], int(end.max() - start.min()))
    times: dict[str, list[int]] = {}
    for (schedule, _), time in slowest.items():
        times.setdefault(schedule, []).append(time)
    return times


def _efficiency(times: dict[str, list[int]], schedule: str) -> float | None:
    """E = 1 - ECT / ECT_sync of median step times; None if a schedule is missing or `sync` exposes nothing."""
    if schedule == FLOOR or not {schedule, FLOOR, BASELINE} <= set(times):
        return None
    floor = median(times[FLOOR])
    exposed_sync = median(times[BASELINE]) - floor
    return 1 - (median(times[schedule]) - floor) / exposed_sync if exposed_sync > 0 else None


def _notes(timelines: Sequence[DeviceTimeline], rows: Sequence[Row]) -> Iterator[str]:
    if not any(row.kind != "local" for row in rows):
        yield "No communication: no kernel of NCCL, no copy between devices, nothing in a range of the exchange."
    if not any(timeline.has_ours for timeline in timelines):
        yield "No ranges of overlap_mtp: communication is told by name alone."
    names = {step.schedule for timeline in timelines for step in timeline.steps}
    if names and all((timeline.step == NONE).all() for timeline in timelines):
        yield "No activity could be tied to a step: the profile lacks the CUDA runtime calls."
    if any((timeline.role == Role.OPAQUE).any() for timeline in timelines):
        yield "CUDA graphs were traced as a whole and count as nothing: profile with --cuda-graph-trace=node."
    if lost := sum(timeline.num_lost for timeline in timelines):
        yield (
            f"{lost:,} kernels are of CUDA graphs that were captured before the profile began, or of a trace without "
            "captures: they are told by name alone."
        )
    if names and not {FLOOR, BASELINE} <= names:
        yield f"No overlap efficiency: it needs steps of {BASELINE} and of {FLOOR}."
