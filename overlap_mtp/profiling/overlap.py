"""What a profile says about its communication: how long it took, and how much of it lay under compute.

Timeline overlap is |communication and compute| / |communication|, over merged intervals on one device, as in
HolisticTraceAnalysis (profiles/README.md says where the two differ). It is evidence. The result to quote is overlap
efficiency (Flux, arXiv 2406.06858): E = 1 - ECT_schedule / ECT_sync, where ECT = T_step - T_step(prepared) is what
communication adds to a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from statistics import mean, median

import numpy as np

from overlap_mtp.profiling.classify import COMMUNICATION, DeviceTimeline, Mask, Role, classify
from overlap_mtp.profiling.intervals import NONE, Ints, covered, merge, merge_each, sum_each
from overlap_mtp.profiling.notes import notes_on
from overlap_mtp.profiling.report import DeviceTotal, Report, Row, Schedule
from overlap_mtp.profiling.schedule_names import BASELINE, EVERYTHING, FLOOR, OUTSIDE, in_usual_order
from overlap_mtp.profiling.trace import UNKNOWN, Profile
from overlap_mtp.profiling.waits import has_peer, peer_waits

StepTimes = dict[str, dict[int, list[int]]]  # of each schedule, in each recording; ns


def report_on(profiles: Sequence[Profile], outside_steps: bool = False) -> Report:
    """Report on one recording.

    Args:
        profiles: one or several files (one for each rank). If two of them have a rank in common they count as
            several recordings, and labels name the file.
        outside_steps: also report what ran outside of the steps, such as a warm-up. It matters only if there are steps.
    """
    groups = [classify(profile) for profile in profiles]
    labels = [timeline.label for group in groups for timeline in group]
    sources = _distinct_names(profiles)
    if len(set(labels)) < len(labels):
        groups = [
            [replace(timeline, label=f"{source}: {timeline.label}") for timeline in group]
            for source, group in zip(sources, groups, strict=True)
        ]
    else:  # one recording, whose ranks wait for each other
        groups = [[timeline for group in groups for timeline in group]]
    measured = [
        _Measured(timeline, wait, outside_steps, recording)
        for recording, group in enumerate(groups)
        for timeline, wait in zip(group, peer_waits(group), strict=True)
    ]
    timelines = tuple(one.timeline for one in measured)
    rows = tuple(row for one in measured for row in one.rows())
    notes = [*notes_on(profiles, timelines, any(one.is_communication.any() for one in measured))]
    names = {name for one in measured for name in one.steps}
    if names and not {FLOOR, BASELINE} <= names:
        notes.append(f"No overlap efficiency: it needs steps of {BASELINE} and of {FLOOR}.")
    times = _step_times(measured)
    if apart := [name for name in in_usual_order(times) if _is_apart(times, name)]:
        notes.append(
            f"No overlap efficiency of {', '.join(apart)}: its steps, or those of {BASELINE} or {FLOOR}, are of "
            "other recordings."
        )
    totals = tuple(total for one in measured for total in one.totals())
    return Report(tuple(sources), rows, _schedules(measured, times), tuple(notes), timelines, totals)


def _distinct_names(profiles: Sequence[Profile]) -> list[str]:
    """The files' names, with as many of their folders as tell them apart, or else with numbers."""
    paths = [PurePath(profile.path or profile.source).parts for profile in profiles]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{profile.source} ({number})" for number, profile in enumerate(profiles, 1)]


class _Measured:
    """A timeline, its compute, and which activities belong to the steps of each schedule."""

    def __init__(self, timeline: DeviceTimeline, wait: Ints, outside_steps: bool, recording: int) -> None:
        self.timeline, self._wait, self.recording = timeline, wait, recording
        self._compute = merge(*timeline.times(timeline.role == Role.COMPUTE))
        self.is_communication: Mask = np.isin(timeline.role, COMMUNICATION)
        self.steps = Counter(step.schedule for step in timeline.steps if not step.is_cut)
        self.schedules = in_usual_order(self.steps)
        if not timeline.steps:
            self.schedules = [EVERYTHING]
            self._schedule = np.zeros(timeline.start.size, np.int64)  # an index into schedules, or NONE
            return
        numbers = {name: number for number, name in enumerate(self.schedules)}
        of_step = [NONE if step.is_cut else numbers[step.schedule] for step in timeline.steps] + [NONE]
        self._schedule = np.array(of_step, np.int64)[timeline.step]
        outside = timeline.step == NONE
        if outside_steps and (self.is_communication & outside).any():
            self._schedule[outside] = len(self.schedules)
            self.schedules.append(OUTSIDE)

    def _overlaps(self, mask: Mask, group: Ints, num_groups: int) -> tuple[Ints, Ints]:
        """How long the activities of each group are (merged), and how much of that lies under compute; ns."""
        of, start, end = merge_each(group, *self.timeline.times(mask))
        hidden = covered(self._compute, start, end)
        return sum_each(of, end - start, num_groups), sum_each(of, hidden, num_groups)

    def overlaps(self, mask: Mask) -> dict[str, tuple[int, int]]:
        """How long the activities in the mask are in each schedule, and how much of that lies under compute; ns."""
        mask = mask & (self._schedule != NONE)
        found = self._overlaps(mask, self._schedule[mask], len(self.schedules))
        pairs = zip(*(column.tolist() for column in found), strict=True)
        return dict(zip(self.schedules, pairs, strict=True))

    def step_shares(self) -> dict[str, list[float]]:
        """The hidden fraction of the exchange in each step that has one, by schedule."""
        mask = (self.timeline.role == Role.EXCHANGE) & (self._schedule != NONE) & (self.timeline.step != NONE)
        steps = self.timeline.steps
        found = self._overlaps(mask, self.timeline.step[mask], len(steps))
        shares: dict[str, list[float]] = {}
        for step, time, hidden in zip(steps, *(column.tolist() for column in found), strict=True):
            if time:
                shares.setdefault(step.schedule, []).append(hidden / time)
        return shares

    def totals(self) -> Iterator[DeviceTotal]:
        """One total for each schedule, in the order of schedules."""
        communication = self.overlaps(self.is_communication)
        compute = self.overlaps(self.timeline.role == Role.COMPUTE)
        waiting = has_peer(self.timeline) & (self._schedule != NONE)
        group, wait = self._schedule[waiting], self._wait[waiting]
        waits_known = np.bincount(group, wait == UNKNOWN, len(self.schedules)) == 0
        waits_known &= np.bincount(group, minlength=len(self.schedules)) > 0
        waited = sum_each(group, wait, len(self.schedules))
        for number, schedule in enumerate(self.schedules):
            time, hidden = communication[schedule]
            yield DeviceTotal(
                device=self.timeline.label,
                schedule=schedule,
                steps=self.steps[schedule],
                communication_us=time / 1000,
                hidden_us=hidden / 1000,
                exposed_us=(time - hidden) / 1000,
                hidden_fraction=hidden / time if time else None,
                peer_wait_us=int(waited[number]) / 1000 if waits_known[number] else None,
                compute_us=compute[schedule][0] / 1000,
            )

    def rows(self) -> Iterator[Row]:
        """The rows in the order of schedules, roles, and the first activity of each range."""
        timeline, roles = self.timeline, (*COMMUNICATION, Role.LOCAL)
        mask = np.isin(timeline.role, roles) & (self._schedule != NONE)
        order_of = np.zeros(len(Role), np.int64)
        order_of[list(roles)] = np.arange(len(roles))
        kind = self._schedule[mask] * len(roles) + order_of[timeline.role[mask]]
        keys, first, group = np.unique(
            kind * len(timeline.parts) + timeline.part[mask], return_index=True, return_inverse=True
        )
        time, hidden = self._overlaps(mask, group, keys.size)
        num_bytes, wait = timeline.num_bytes[mask], self._wait[mask]
        bytes_known = np.bincount(group, num_bytes != UNKNOWN, keys.size) > 0
        waits_known = np.bincount(group, wait == UNKNOWN, keys.size) == 0
        sent = sum_each(group, np.maximum(num_bytes, 0), keys.size)
        waited = sum_each(group, wait, keys.size)
        launches = np.bincount(group, minlength=keys.size)
        for at in np.lexsort((first, kind[first])).tolist():
            schedule, role = divmod(int(kind[first[at]]), len(roles))
            shared = roles[role] != Role.LOCAL
            yield Row(
                device=timeline.label,
                schedule=self.schedules[schedule],
                range=timeline.parts[keys[at] % len(timeline.parts)],
                kind=roles[role].name.lower(),
                steps=self.steps[self.schedules[schedule]],
                time_us=int(time[at]) / 1000,
                hidden_us=int(hidden[at]) / 1000 if shared else None,
                exposed_us=int(time[at] - hidden[at]) / 1000 if shared else None,
                hidden_fraction=int(hidden[at]) / int(time[at]) if shared and time[at] else None,
                peer_wait_us=int(waited[at]) / 1000 if shared and waits_known[at] else None,
                launches=int(launches[at]),
                bytes=int(sent[at]) if bytes_known[at] else None,
            )


def _schedules(measured: Sequence[_Measured], times: StepTimes) -> tuple[Schedule, ...]:
    exchange = [one.overlaps(one.timeline.role == Role.EXCHANGE) for one in measured]
    everything = [one.overlaps(one.is_communication) for one in measured]
    shares: dict[str, list[float]] = {}
    for one in measured:
        for name, of_steps in one.step_shares().items():
            shares.setdefault(name, []).extend(of_steps)
    of_recording: dict[int, Counter[str]] = {}
    for one in measured:
        of_recording[one.recording] = (
            of_recording.get(one.recording, Counter()) | one.steps
        )  # the larger count
    steps = sum(of_recording.values(), Counter[str]())
    return tuple(
        Schedule(
            name,
            steps[name],
            _median(times[name]) / 1e6 if name in times else None,
            *_fractions([each[name] for each in exchange if name in each]),
            *_of_steps(shares.get(name, [])),
            *_fractions([each[name] for each in everything if name in each]),
            _efficiency(times, name),
        )
        for name in in_usual_order(name for one in measured for name in one.schedules)
    )


def _fractions(overlaps: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """The hidden fraction of all devices together and of the worst; None if there is nothing to hide."""
    shares = [hidden / time for time, hidden in overlaps if time]
    if not shares:
        return None, None
    return sum(hidden for _, hidden in overlaps) / sum(time for time, _ in overlaps), min(shares)


def _of_steps(shares: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The mean of these fractions, what a tenth of them stay below, and the least; None if there are none."""
    return (mean(shares), float(np.quantile(shares, 0.1)), min(shares)) if shares else (None, None, None)


def _step_times(measured: Sequence[_Measured]) -> StepTimes:
    """The time of each step, from first to last activity, on the slowest device of its recording; ns.

    A step that is cut off on one device is left out on all.
    """
    slowest: Counter[tuple[str, int, int]] = Counter()
    cut = {
        (step.schedule, one.recording, step.number)
        for one in measured
        for step in one.timeline.steps
        if step.is_cut
    }
    for one in measured:
        timeline = one.timeline
        begin = np.full(len(timeline.steps), np.iinfo(np.int64).max)
        end = np.full(len(timeline.steps), np.iinfo(np.int64).min)
        inside = timeline.step != NONE
        np.minimum.at(begin, timeline.step[inside], timeline.start[inside])
        np.maximum.at(end, timeline.step[inside], timeline.end[inside])
        for step, first, last in zip(timeline.steps, begin.tolist(), end.tolist(), strict=True):
            key = (step.schedule, one.recording, step.number)
            if first <= last and key not in cut:
                slowest[key] = max(slowest[key], last - first)
    times: StepTimes = {}
    for (schedule, recording, _), time in slowest.items():
        times.setdefault(schedule, {}).setdefault(recording, []).append(time)
    return times


def _median(times: Mapping[int, Sequence[int]]) -> float:
    """The median over all recordings."""
    return median(time for of_recording in times.values() for time in of_recording)


def _has_efficiency(times: StepTimes, schedule: str) -> bool:
    return schedule != FLOOR and {schedule, FLOOR, BASELINE} <= set(times)


def _is_apart(times: StepTimes, schedule: str) -> bool:
    """Whether the steps that the efficiency compares are of different recordings."""
    if not _has_efficiency(times, schedule):
        return False
    return not set(times[schedule]) == set(times[FLOOR]) == set(times[BASELINE])


def _efficiency(times: StepTimes, schedule: str) -> float | None:
    """E = 1 - ECT / ECT_sync of median step times.

    None if a schedule is missing or of another recording, or if `sync` exposes nothing.
    """
    if not _has_efficiency(times, schedule) or _is_apart(times, schedule):
        return None
    floor = _median(times[FLOOR])
    exposed_sync = _median(times[BASELINE]) - floor
    return 1 - (_median(times[schedule]) - floor) / exposed_sync if exposed_sync > 0 else None
