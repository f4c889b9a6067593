"""What a profile says about its communication: how long it took, and how much of it lay under compute.

Timeline overlap is |communication and compute| / |communication|, over merged intervals on one device (as in
HolisticTraceAnalysis). It is evidence; the headline is overlap efficiency (Flux, arXiv 2406.06858):
E = 1 - ECT_schedule / ECT_sync, where ECT = T_step - T_step(prepared) is what communication adds to a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.classify import Lane, Role, base_name, lanes_of
from overlap_mtp.profiling.intervals import Union, covered, length, merge
from overlap_mtp.profiling.nesting import NONE
from overlap_mtp.profiling.peers import peer_waits
from overlap_mtp.profiling.trace import UNKNOWN, Profile

EVERYTHING, OUTSIDE = "all", "outside steps"  # schedules where there is no step
FLOOR, BASELINE, JUDGED = "prepared", "sync", "prefetch"
COMMUNICATION = (Role.EXCHANGE, Role.MODEL)
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """The communication (or, of kind "local", the work of the exchange) of one range on one device.

    Sums over `steps` steps, in µs. Peer wait is a kernel's own duration less that of its shortest participant, and
    None where participants cannot be told. What is None does not apply or is not known.
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
    """What was found, and what has to be said about it."""

    sources: tuple[str, ...]
    rows: tuple[Row, ...]
    schedules: tuple[Schedule, ...]
    notes: tuple[str, ...]
    lanes: tuple[Lane, ...]

    def judged(self) -> tuple[str, float | None]:
        """What `--min-hidden` judges, and its hidden fraction on the worst device (None: there is none).

        The exchange of the `prefetch` steps; without step ranges that of the whole profile; without any range of
        this project all communication.
        """
        by_name = {schedule.name: schedule for schedule in self.schedules}
        if not any(lane.has_ours for lane in self.lanes):
            return "all communication", by_name[EVERYTHING].all_worst
        if any(lane.steps for lane in self.lanes):
            shares = [one.exchange_worst for one in self.schedules if base_name(one.name) == JUDGED]
            found = [share for share in shares if share is not None]
            return f"the exchange in {JUDGED} steps", min(found, default=None)
        return "the exchange", by_name[EVERYTHING].exchange_worst

    def as_json(self) -> dict[str, Any]:
        """Everything but the activities themselves."""
        what, fraction = self.judged()
        return {
            "sources": list(self.sources),
            "devices": [lane.label for lane in self.lanes],
            "judged": {"what": what, "hidden_fraction": fraction},
            "schedules": [asdict(schedule) for schedule in self.schedules],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def report_on(profiles: Sequence[Profile]) -> Report:
    """The report on one recording, of one or of several files (one a rank)."""
    groups = [lanes_of(profile) for profile in profiles]
    labels = Counter(lane.label for lanes in groups for lane in lanes)
    if max(labels.values()) > 1:  # several recordings: ranks of different files are no participants
        named = zip(profiles, groups, strict=True)
        groups = [[replace(o, label=f"{p.source}: {o.label}") for o in lanes] for p, lanes in named]
        waits = [wait for lanes in groups for wait in peer_waits(lanes)]
    else:
        waits = peer_waits([lane for lanes in groups for lane in lanes])
    lanes = tuple(lane for group in groups for lane in group)
    measured = [_Measured(lane, wait) for lane, wait in zip(lanes, waits, strict=True)]
    rows = tuple(row for one in measured for row in one.rows())
    return Report(
        tuple(profile.source for profile in profiles),
        rows,
        _schedules(measured),
        tuple(_notes(lanes, rows)),
        lanes,
    )


class _Measured:
    """A lane, and its compute."""

    def __init__(self, lane: Lane, wait: npt.NDArray[np.int64]) -> None:
        self.lane, self._wait = lane, wait
        self._compute = merge(*lane.where(lane.role == Role.COMPUTE))
        self.is_communication: Mask = np.isin(lane.role, COMMUNICATION)

    def schedules(self) -> dict[str, Mask]:
        """Which activities belong to the steps of each schedule, in the order of their first steps."""
        lane = self.lane
        if not lane.steps:
            return {EVERYTHING: np.ones(lane.start.size, bool)}
        names = dict.fromkeys(step.schedule for step in lane.steps)
        of_step = np.array([list(names).index(step.schedule) for step in lane.steps] + [-1])
        number = np.where(lane.step == NONE, -1, of_step[lane.step])
        masks = {name: number == index for index, name in enumerate(names)}
        outside = number == -1
        return {**masks, OUTSIDE: outside} if (outside & self.is_communication).any() else masks

    def overlap(self, mask: Mask) -> tuple[int, int]:
        """How long these activities are (merged), and how much of that lies under compute; ns."""
        union: Union = merge(*self.lane.where(mask))
        return length(union), int(covered(self._compute, *union).sum())

    def rows(self) -> Iterator[Row]:
        lane = self.lane
        for schedule, inside in self.schedules().items():
            for role in (*COMMUNICATION, Role.LOCAL):
                of_role = inside & (lane.role == role)
                for part in dict.fromkeys(lane.part[of_role].tolist()):
                    yield self._row(schedule, role, part, of_role & (lane.part == part))

    def _row(self, schedule: str, role: Role, part: int, mask: Mask) -> Row:
        time, hidden = self.overlap(mask)
        bytes_ = self.lane.num_bytes[mask]
        wait = self._wait[mask]
        shared = role != Role.LOCAL
        return Row(
            self.lane.label,
            schedule,
            self.lane.parts[part],
            role.name.lower(),
            sum(step.schedule == schedule for step in self.lane.steps),
            time / 1000,
            hidden / 1000 if shared else None,
            (time - hidden) / 1000 if shared else None,
            hidden / time if shared and time else None,
            float(wait.sum()) / 1000 if shared and (wait != UNKNOWN).all() else None,
            int(mask.sum()),
            int(bytes_[bytes_ != UNKNOWN].sum()) if (bytes_ != UNKNOWN).any() else None,
        )


def exposed_by_step(lane: Lane) -> npt.NDArray[np.float64]:
    """For each of `lane.steps`, how long its exchange (`pack` and `send-recv`) was not under compute on the device.

    In µs, of merged intervals; NaN where no exchange could be tied to the step.
    """
    compute = merge(*lane.where(lane.role == Role.COMPUTE))
    exchange = np.flatnonzero((lane.role == Role.EXCHANGE) & (lane.step != NONE))
    exposed = np.full(len(lane.steps), np.nan)
    for step in np.unique(lane.step[exchange]).tolist():
        mine = exchange[lane.step[exchange] == step]
        union = merge(lane.start[mine], lane.end[mine])
        exposed[step] = (length(union) - int(covered(compute, *union).sum())) / 1000
    return exposed


def _schedules(measured: list[_Measured]) -> tuple[Schedule, ...]:
    times = _step_times(measured)
    names = dict.fromkeys(name for one in measured for name in one.schedules())
    found = []
    for name in names:
        inside = [(one, one.schedules()[name]) for one in measured if name in one.schedules()]
        exchange = [one.overlap(mask & (one.lane.role == Role.EXCHANGE)) for one, mask in inside]
        everything = [one.overlap(mask & one.is_communication) for one, mask in inside]
        found.append(
            Schedule(
                name,
                max(sum(step.schedule == name for step in one.lane.steps) for one, _ in inside),
                median(times[name]) / 1e6 if times.get(name) else None,
                *_fractions(exchange),
                *_fractions(everything),
                efficiency(times, name),
            )
        )
    return tuple(found)


def _fractions(overlaps: list[tuple[int, int]]) -> tuple[float | None, float | None]:
    """Of all devices together and of the worst; None where there is nothing to hide."""
    shares = [hidden / time for time, hidden in overlaps if time]
    if not shares:
        return None, None
    return sum(hidden for _, hidden in overlaps) / sum(time for time, _ in overlaps), min(shares)


def _step_times(measured: list[_Measured]) -> dict[str, list[int]]:
    """For each schedule the time of each of its steps, from first to last activity, on the slowest device; ns."""
    slowest: dict[tuple[str, int], int] = {}
    for one in measured:
        lane = one.lane
        inside = np.flatnonzero(lane.step != NONE)
        if not inside.size:
            continue
        first = np.full(len(lane.steps), np.iinfo(np.int64).max)
        last = np.full(len(lane.steps), np.iinfo(np.int64).min)
        np.minimum.at(first, lane.step[inside], lane.start[inside])
        np.maximum.at(last, lane.step[inside], lane.end[inside])
        for at in np.unique(lane.step[inside]).tolist():
            key = (lane.steps[at].schedule, lane.steps[at].number)
            slowest[key] = max(slowest.get(key, 0), int(last[at] - first[at]))
    times: dict[str, list[int]] = {}
    for (schedule, _), time in slowest.items():
        times.setdefault(schedule, []).append(time)
    return times


def efficiency(times: dict[str, list[int]], schedule: str) -> float | None:
    """E = 1 - ECT / ECT_sync of median step times; None where a schedule is missing or `sync` exposes nothing."""
    if schedule == FLOOR or not all(times.get(name) for name in (schedule, FLOOR, BASELINE)):
        return None
    floor = median(times[FLOOR])
    exposed_sync = median(times[BASELINE]) - floor
    return 1 - (median(times[schedule]) - floor) / exposed_sync if exposed_sync > 0 else None


def _notes(lanes: Sequence[Lane], rows: Sequence[Row]) -> Iterator[str]:
    if not any(row.kind != "local" for row in rows):
        yield "No communication: no kernel of NCCL, no copy between devices, nothing in a range of the exchange."
    if not any(lane.has_ours for lane in lanes):
        yield "No ranges of overlap_mtp: communication is told by name alone."
    launched = sum(int((lane.step != NONE).sum()) for lane in lanes)
    if any(lane.steps for lane in lanes) and not launched:
        yield "No activity could be tied to a step: the profile lacks the CUDA runtime calls."
    names = {step.schedule for lane in lanes for step in lane.steps}
    if any((lane.role == Role.OPAQUE).any() for lane in lanes):
        yield "CUDA graphs were traced as a whole and count as nothing: profile with --cuda-graph-trace=node."
    if lost := sum(lane.num_lost for lane in lanes):
        yield (
            f"{lost:,} kernels are of CUDA graphs that were captured before the profile began, or of a trace without "
            "captures: they are told by name alone."
        )
    if names and not {FLOOR, BASELINE} <= names:
        yield f"No overlap efficiency: it needs steps of {BASELINE} and of {FLOOR}."
