"""Tell communication from compute: first by our range at the launch, then by name.

A Triton kernel that moves tokens looks like compute to a filter on names, so the innermost range of ours that holds
the launching call decides. Names count only if there is no such range. A kernel of a CUDA graph that was launched
outside of an exchange belongs to the range in which it was captured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.intervals import NONE, Ints, Nesting, Union
from overlap_mtp.profiling.trace import LOST, Kind, Profile, Texts
from overlap_mtp.tracing import LABEL

COMMUNICATION_NAME = re.compile(r"nccl|rccl|nvshmem|multimem|(one|two)_shot_all_reduce", re.IGNORECASE)
LIBRARY_RANGE = re.compile(r"^nccl", re.IGNORECASE)  # NCCL and torch put these around each call
REGIONS = ("trunk", "depth", "loss", "backward")  # the parts of a step
NO_RANGE = "no range"
PAYLOAD_BYTES = (1 << 40) - 1  # the bits of a payload that count bytes (overlap_mtp.tracing)
Mask = npt.NDArray[np.bool_]


class Role(IntEnum):
    """What an activity is to the overlap. Only compute can hide communication."""

    COMPUTE = 0
    EXCHANGE = 1  # communication in the ranges `pack` and `send-recv`
    MODEL = 2  # any other communication
    LOCAL = 3  # the exchange's own work, in the ranges `join` and `unroll`
    NEITHER = 4  # copies between host and device
    OPAQUE = 5  # a CUDA graph whose kernels were not traced


ROLE_OF_RANGE = {"pack": Role.EXCHANGE, "send-recv": Role.EXCHANGE, "join": Role.LOCAL, "unroll": Role.LOCAL}


@dataclass(frozen=True)
class Step:
    """One range `step <schedule>` of a process; `number` counts the steps of that schedule."""

    schedule: str
    number: int
    start: int  # ns, on the host
    end: int


@dataclass(frozen=True)
class DeviceTimeline:
    """What one process did on one device, sorted by start; times in ns."""

    label: str  # "rank 0", or process and device if nothing tells the rank
    start: Ints
    end: Ints
    stream: Ints
    role: Ints  # Role
    part: Ints  # the innermost range, an index into `parts`
    region: Ints  # the part of a step that it belongs to, an index into `parts`
    step: Ints  # an index into `steps`, or NONE
    num_bytes: Ints  # or UNKNOWN
    parts: tuple[str, ...]
    steps: tuple[Step, ...]
    has_ours: bool  # the profile has ranges of this project
    num_lost: int  # kernels of CUDA graphs captured before the profile began: classified by name alone

    def times(self, mask: Mask) -> Union:
        """Return starts and ends of the activities in the mask."""
        return self.start[mask], self.end[mask]


def base_name(schedule: str) -> str:
    """Return `prefetch` for `prefetch:process_group`, which names a transport too."""
    return schedule.split(":")[0]


def classify(profile: Profile) -> list[DeviceTimeline]:
    """Give each device activity its role, its range, its step and its bytes.

    Returns:
        One timeline for each process and device, sorted by rank (or by process) and device.
    """
    activities = profile.activities
    columns, is_lost, parts = _columns(profile)
    timelines = []
    for label, process, device in _devices(profile):
        here = np.flatnonzero((activities.process == process) & (activities.device == device))
        here = here[np.argsort(activities.start[here], kind="stable")]
        steps = _steps(profile, process)
        timelines.append(
            DeviceTimeline(
                label=label,
                step=_step_of(steps, activities.launched[here]),
                parts=parts,
                steps=steps,
                has_ours=bool(profile.ranges.is_ours.any()),
                num_lost=int(is_lost[here].sum()),
                **{name: column[here] for name, column in columns.items()},
            )
        )
    return timelines


def _columns(profile: Profile) -> tuple[dict[str, Ints], Mask, tuple[str, ...]]:
    """The columns of a DeviceTimeline for all activities, which of them are lost, and the names of parts."""
    activities, ranges = profile.activities, profile.ranges
    labels = [LABEL.match(text) for text in profile.texts]
    names = [label["name"] if label else "" for label in labels]
    range_roles = np.array([ROLE_OF_RANGE.get(name, NONE) for name in names], np.int64)[ranges.text]
    launched_in, captured_in = _innermost(profile, ranges.is_ours)
    in_exchange = _pick(range_roles, launched_in, NONE) != NONE
    by_launch = in_exchange | (captured_in == NONE)
    mine = np.where(by_launch, launched_in, captured_in)
    role = _roles(profile, _pick(range_roles, mine, NONE))

    parts = Texts({NO_RANGE: 0})
    own_parts = [
        parts[f"{name} {label['detail']}" if label and name == "depth" else name]
        for label, name in zip(labels, names, strict=True)
    ]
    other_parts = [parts[text] for text in profile.texts]
    range_parts = np.array([other_parts, own_parts], np.int64)[ranges.is_ours.astype(int), ranges.text]
    is_library = np.array([LIBRARY_RANGE.match(text) is not None for text in profile.texts], bool)
    launched, captured = _innermost(profile, ~ranges.is_ours & ~is_library[ranges.text])
    innermost = np.where(mine != NONE, mine, np.where(captured == NONE, launched, captured))
    is_region = ranges.is_ours & np.array([name in REGIONS for name in names], bool)[ranges.text]
    region_range = np.where(by_launch, *_innermost(profile, is_region))

    # A range in which a graph was captured counts again in each launch of the graph.
    occasion = np.stack([mine, np.where(by_launch, 0, activities.launched)])
    payload_bytes = _pick(ranges.payload & PAYLOAD_BYTES, mine, 0)
    columns = {
        "start": activities.start,
        "end": activities.end,
        "stream": activities.stream,
        "role": role,
        "part": _pick(range_parts, innermost, 0),
        "region": _pick(range_parts, region_range, 0),
        "num_bytes": _bytes(activities.num_bytes, payload_bytes, occasion, role),
    }
    return columns, ~in_exchange & (activities.captured == LOST), tuple(parts)


def _innermost(profile: Profile, chosen: Mask) -> tuple[Ints, Ints]:
    """For each activity the innermost of the chosen ranges at its launch and at its capture: an index, or NONE."""
    activities, ranges = profile.activities, profile.ranges
    index = np.flatnonzero(chosen)
    nesting = Nesting(ranges.thread[index], ranges.start[index], ranges.end[index])
    launched = nesting.innermost(activities.thread, activities.launched)
    captured = nesting.innermost(activities.capture_thread, activities.captured)
    return _pick(index, launched, NONE), _pick(index, captured, NONE)


def _pick(values: Ints, index: Ints, default: int) -> Ints:
    """The values at an index, and the default at NONE."""
    return np.append(values, default)[index]


def _roles(profile: Profile, range_role: Ints) -> Ints:
    """The roles of all activities; `range_role` is that of the range of ours, or NONE."""
    activities = profile.activities
    is_named = np.array([COMMUNICATION_NAME.search(name) is not None for name in profile.names], bool)
    role = np.full(range_role.size, Role.COMPUTE, np.int64)
    role[is_named[activities.name] & (activities.kind == Kind.KERNEL)] = Role.MODEL
    role[activities.kind == Kind.PEER_COPY] = Role.MODEL
    role[activities.kind == Kind.GRAPH] = Role.OPAQUE
    role = np.where(range_role == NONE, role, range_role)
    role[activities.kind == Kind.HOST_COPY] = Role.NEITHER
    return role


def _bytes(counted: Ints, payload_bytes: Ints, occasion: Ints, role: Ints) -> Ints:
    """Bytes of each activity. The bytes of a range's payload are put on the first activity of each occasion."""
    told = np.flatnonzero((payload_bytes > 0) & (role == Role.EXCHANGE))
    first = told[np.unique(occasion[:, told], axis=1, return_index=True)[1]]
    num_bytes = counted.copy()
    num_bytes[told] = 0
    num_bytes[first] = payload_bytes[first]
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


def _step_of(steps: Sequence[Step], launched: Ints) -> Ints:
    """The step of each activity. A step ends synchronised, so all that its process launched in it belongs to it."""
    starts = np.array([step.start for step in steps], np.int64)
    ends = np.array([step.end for step in steps], np.int64)
    at = np.searchsorted(starts, launched, side="right") - 1
    return np.where(launched <= _pick(ends, at, np.iinfo(np.int64).min), at, NONE)


def _devices(profile: Profile) -> list[tuple[str, int, int]]:
    """Label, process and device of each timeline; the device is in the label if the process uses several."""
    activities = profile.activities
    pairs = set(zip(activities.process.tolist(), activities.device.tolist(), strict=True))
    devices = Counter(process for process, _ in pairs)
    found = []
    for process, device in pairs:
        rank = profile.rank(process)
        kind, number = ("process", profile.pids[process]) if rank is None else ("rank", rank)
        needs_device = rank is None or devices[process] > 1
        label = f"{kind} {number}" + (f" device {device}" if needs_device else "")
        found.append((kind, number, device, process, label))
    return [(label, process, device) for *_, device, process, label in sorted(found)]
