"""Tells communication from compute: by our ranges at launch first, then by name.

A Triton kernel that moves tokens looks like compute to a filter on names, so the innermost range of ours that holds
the launching call decides. Only where there is none do names count. A kernel of a CUDA graph that was launched
outside of an exchange belongs where it was captured.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.intervals import Ints
from overlap_mtp.profiling.nesting import NONE, Nesting
from overlap_mtp.profiling.trace import LOST, PAYLOAD_BYTES, UNKNOWN, Kind, Profile
from overlap_mtp.tracing import LABEL

COMMUNICATION_NAME = re.compile(r"nccl|rccl|nvshmem|multimem|(one|two)_shot_all_reduce", re.IGNORECASE)
EXCHANGE_RANGES = ("pack", "send-recv")
LOCAL_RANGES = ("join", "unroll")
REGIONS = ("trunk", "depth", "loss", "backward")  # the parts of a step
OF_LIBRARIES = re.compile(r"^nccl", re.IGNORECASE)  # ranges that NCCL and torch put around each call
NO_RANGE = "no range"


class Role(IntEnum):
    """What an activity is to the overlap. Compute alone can hide communication."""

    COMPUTE = 0
    EXCHANGE = 1  # communication in the ranges `pack` and `send-recv`
    MODEL = 2  # any other communication
    LOCAL = 3  # the exchange's own work, in the ranges `join` and `unroll`
    NEITHER = 4  # copies between host and device
    OPAQUE = 5  # a CUDA graph of which the kernels were not traced


@dataclass(frozen=True)
class Step:
    """One range `step <schedule>` of a process; `number` counts the steps of that schedule."""

    schedule: str
    number: int
    start: int  # ns, on the host
    end: int


@dataclass(frozen=True)
class Lane:
    """What one process did on one device, by start; times in ns."""

    label: str  # "rank 0", or process and device where no range tells the rank
    start: Ints
    end: Ints
    stream: Ints
    role: Ints  # Role
    part: Ints  # the innermost range, an index into `parts`
    region: Ints  # the part of a step that it belongs to, an index into `parts`
    step: Ints  # an index into `steps`, or NONE
    num_bytes: Ints  # UNKNOWN where nobody counted
    parts: tuple[str, ...]
    steps: tuple[Step, ...]
    has_ours: bool  # the profile has ranges of this project
    num_lost: int  # kernels of CUDA graphs that were captured before the profile began: told by name alone

    def where(self, mask: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Starts and ends of some of its activities."""
        return self.start[mask], self.end[mask]


def base_name(schedule: str) -> str:
    """`prefetch` of `prefetch:process_group`, which names a transport too."""
    return schedule.split(":")[0]


def lanes_of(profile: Profile) -> list[Lane]:
    """The lanes of a profile, classified, in the order of their labels."""
    activities, ranges = profile.activities, profile.ranges
    ours = _Ours(profile)
    launched_in = ours.innermost(activities.thread, activities.launched)
    captured_in = ours.innermost(activities.capture_thread, activities.captured)
    in_exchange = ours.is_of_exchange(launched_in)
    is_lost = ~in_exchange & (activities.captured == LOST)
    by_launch = in_exchange | (captured_in == NONE)
    mine = np.where(by_launch, launched_in, captured_in)
    region = ours.region_of(mine)
    part = np.where(mine == NONE, _foreign_parts(profile, ours), ours.part_of(mine))
    role = _roles(profile, ours.parts, mine != NONE, part)
    # A range in which a graph was captured counts anew in each launch of the graph.
    occasion = np.stack([mine, np.where(by_launch, 0, activities.launched)])
    num_bytes = _bytes(activities.num_bytes, ours.payload, occasion, role)
    steps = {process: _steps(profile, process) for process in np.unique(activities.process).tolist()}
    labels = _labels(profile)
    lanes = []
    for (process, device), label in sorted(labels.items(), key=lambda item: _natural(item[1])):
        here = np.flatnonzero((activities.process == process) & (activities.device == device))
        here = here[np.argsort(activities.start[here], kind="stable")]
        lanes.append(
            Lane(
                label=label,
                start=activities.start[here],
                end=activities.end[here],
                stream=activities.stream[here],
                role=role[here],
                part=part[here],
                region=region[here],
                step=_step_of(steps[process], activities.launched[here]),
                num_bytes=num_bytes[here],
                parts=tuple(ours.parts),
                steps=steps[process],
                has_ours=bool(ranges.is_ours.any()),
                num_lost=int(is_lost[here].sum()),
            )
        )
    return lanes


class _Ours:
    """The ranges of this project, and the names of what lies in them."""

    def __init__(self, profile: Profile) -> None:
        ranges = profile.ranges
        self._index = np.flatnonzero(ranges.is_ours)
        self._nesting = Nesting(
            *(column[self._index] for column in (ranges.thread, ranges.start, ranges.end))
        )
        self.payload = ranges.payload[self._index]
        self.parts = [NO_RANGE]
        labels = [LABEL.match(profile.texts[text]) for text in ranges.text[self._index]]
        names = [label["name"] if label else "" for label in labels]
        parts = [
            self.number(f"{label['name']} {label['detail']}" if label and label["name"] == "depth" else name)
            for label, name in zip(labels, names, strict=True)
        ]
        self._part = np.array(parts, np.int64)
        self._region = np.zeros_like(self._part)
        parents = self._nesting.parents()
        for i in np.argsort(ranges.start[self._index], kind="stable").tolist():  # outer ones first
            if names[i] in REGIONS:
                self._region[i] = self._part[i]
            elif parents[i] != NONE:
                self._region[i] = self._region[parents[i]]

    def number(self, part: str) -> int:
        if part not in self.parts:
            self.parts.append(part)
        return self.parts.index(part)

    def innermost(self, thread: Ints, time: Ints) -> Ints:
        """The innermost range of ours at each time on each thread, as an index into these ranges, or NONE."""
        return self._nesting.innermost(thread, time)

    def is_of_exchange(self, mine: Ints) -> npt.NDArray[np.bool_]:
        names = (*EXCHANGE_RANGES, *LOCAL_RANGES)
        return np.isin(
            self.part_of(mine), [number for number, part in enumerate(self.parts) if part in names]
        )

    def part_of(self, mine: Ints) -> Ints:
        return _pick(self._part, mine)

    def region_of(self, mine: Ints) -> Ints:
        return _pick(self._region, mine)


def _pick(values: Ints, index: Ints) -> Ints:
    return np.append(values, 0)[index]  # NONE picks the last one, which is NO_RANGE


def _foreign_parts(profile: Profile, ours: _Ours) -> Ints:
    """The innermost range of others at each launch, as a number of a part."""
    ranges, activities = profile.ranges, profile.activities
    libraries = np.array([OF_LIBRARIES.match(text) is not None for text in profile.texts], bool)
    others = np.flatnonzero(~ranges.is_ours & ~libraries[ranges.text])
    nesting = Nesting(*(column[others] for column in (ranges.thread, ranges.start, ranges.end)))
    captured = nesting.innermost(activities.capture_thread, activities.captured)
    found = np.where(captured == NONE, nesting.innermost(activities.thread, activities.launched), captured)
    texts, inverse = np.unique(np.append(ranges.text[others], UNKNOWN)[found], return_inverse=True)
    known = {part: number for number, part in enumerate(ours.parts)}
    numbers = []
    for text in texts.tolist():
        part = NO_RANGE if text == UNKNOWN else profile.texts[text]
        if part not in known:
            known[part] = len(known)
            ours.parts.append(part)
        numbers.append(known[part])
    return np.array(numbers, np.int64)[inverse]


def _roles(profile: Profile, parts: list[str], is_ours: npt.NDArray[np.bool_], part: Ints) -> Ints:
    activities = profile.activities
    named = np.array([COMMUNICATION_NAME.search(name) is not None for name in profile.names], bool)
    role = np.full(part.size, Role.COMPUTE, np.int64)
    role[(named[activities.name] & (activities.kind == Kind.KERNEL))] = Role.MODEL
    role[activities.kind == Kind.PEER_COPY] = Role.MODEL
    role[activities.kind == Kind.GRAPH] = Role.OPAQUE
    for names, theirs in ((EXCHANGE_RANGES, Role.EXCHANGE), (LOCAL_RANGES, Role.LOCAL)):
        numbers = [number for number, name in enumerate(parts) if name in names]
        role[is_ours & np.isin(part, numbers)] = theirs
    role[activities.kind == Kind.HOST_COPY] = Role.NEITHER
    return role


def _bytes(counted: Ints, payload: Ints, occasion: Ints, role: Ints) -> Ints:
    """Bytes of each activity. What a range's payload counts stands at the first activity of each occasion."""
    counts = np.append(payload & PAYLOAD_BYTES, 0)[occasion[0]]
    told = np.flatnonzero((counts > 0) & (role == Role.EXCHANGE))
    first = told[np.unique(occasion[:, told], axis=1, return_index=True)[1]]
    num_bytes = counted.copy()
    num_bytes[told] = 0
    num_bytes[first] = counts[first]
    return num_bytes


def _steps(profile: Profile, process: int) -> tuple[Step, ...]:
    """The steps of a process, by start."""
    ranges = profile.ranges
    mine = np.flatnonzero(ranges.is_ours & (ranges.process == process))
    seen: Counter[str] = Counter()
    steps = []
    for at in mine[np.argsort(ranges.start[mine], kind="stable")].tolist():
        label = LABEL.match(profile.texts[ranges.text[at]])
        if label is not None and label["name"] == "step":
            schedule = label["detail"] or "step"
            steps.append(Step(schedule, seen[schedule], int(ranges.start[at]), int(ranges.end[at])))
            seen[schedule] += 1
    return tuple(steps)


def _step_of(steps: tuple[Step, ...], launched: Ints) -> Ints:
    """Steps end synchronised: what any thread of the process launched in one belongs to it."""
    if not steps:
        return np.full(launched.size, NONE, np.int64)
    starts = np.array([step.start for step in steps], np.int64)
    ends = np.array([step.end for step in steps], np.int64)
    at = np.searchsorted(starts, launched, side="right") - 1
    return np.where((at >= 0) & (launched <= ends[at]), at, NONE)


def _labels(profile: Profile) -> dict[tuple[int, int], str]:
    """(process, device) -> "rank 0", and the device where a process uses several."""
    activities = profile.activities
    pairs = sorted(set(zip(activities.process.tolist(), activities.device.tolist(), strict=True)))
    devices = Counter(process for process, _ in pairs)
    labels = {}
    for process, device in pairs:
        rank = profile.rank(process)
        if rank is None:
            labels[process, device] = f"process {profile.pids[process]} device {device}"
        else:
            labels[process, device] = f"rank {rank}" + (f" device {device}" if devices[process] > 1 else "")
    return labels


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sorts "rank 2" before "rank 10"."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in text.split()]
