"""Tell communication from compute: first by our range at the launch, then by name.

A Triton kernel that moves tokens looks like compute to a filter on names, so the innermost range of ours that holds
the launching call decides. Names (`names`) count only if there is no such range. A kernel without a name, or with one
that only sounds like communication, is neither: it hides nothing, and the report lists it. A kernel of a CUDA graph
that was launched outside of an exchange belongs to the range in which it was captured. If that was before the profile
began, the package's own kernels are known by their names, so that they are never compute that hides communication.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from overlap_mtp.profiling.intervals import FOREVER, NONE, Ints, Nesting, Union
from overlap_mtp.profiling.names import NameKind, kind_of_name
from overlap_mtp.profiling.trace import LOST, UNKNOWN, Kind, Profile, Texts, label_of

LIBRARY_RANGE = re.compile(r"^nccl", re.IGNORECASE)  # NCCL and torch put these around each call
REGIONS = ("trunk", "depth", "loss", "backward")  # the parts of a step
NO_RANGE = "no range"
IN_BACKWARD = " in backward"  # after the name of a range of an exchange: gradients of activations travel
# Numbers that torch counts up, so that a name comes once in a profile: emit_nvtx's, and the profiler's own steps.
COUNTED = re.compile(r",? *\b(op_id|seq(?:_id)?) = \d+|(?<=^ProfilerStep)#\d+")
PAYLOAD_BYTES = (1 << 40) - 1  # the bits of a payload that count bytes (overlap_mtp.tracing)
Mask = npt.NDArray[np.bool_]


class Role(IntEnum):
    """What an activity is to the overlap. Only compute can hide communication."""

    COMPUTE = 0
    EXCHANGE = 1  # communication in the ranges `pack` and `send-recv`
    MODEL = 2  # any other communication
    EXPERTS = 6  # communication of libraries like DeepEP, which send tokens to experts and back
    LOCAL = 3  # the exchange's own work: in `join` and `unroll`, or by a kernel of this package elsewhere
    NEITHER = 4  # copies between host and device; a kernel that cannot be told
    OPAQUE = 5  # a CUDA graph whose kernels were not traced


COMMUNICATION = (Role.EXCHANGE, Role.MODEL, Role.EXPERTS)
ROLE_OF_RANGE = {"pack": Role.EXCHANGE, "send-recv": Role.EXCHANGE, "join": Role.LOCAL, "unroll": Role.LOCAL}

ROLE_OF_NAME = {
    NameKind.COMPUTE: Role.COMPUTE,
    NameKind.COMMUNICATION: Role.MODEL,
    NameKind.EXPERTS: Role.EXPERTS,
    NameKind.SUSPECT: Role.NEITHER,
    NameKind.UNNAMED: Role.NEITHER,
    NameKind.OWN: Role.LOCAL,
}


@dataclass(frozen=True)
class Step:
    """One range `step <schedule>` of a process; `number` counts the steps of that schedule."""

    schedule: str
    number: int
    start: int  # ns, on the host
    end: int

    @property
    def is_cut(self) -> bool:
        """Whether the capture stopped before the step ended, so that the step is not there as a whole."""
        return self.end >= FOREVER


@dataclass(frozen=True)
class DeviceTimeline:
    """What one process did on one device, sorted by start; times in ns."""

    label: str  # "rank 0", or process and device if nothing tells the rank
    profile: Profile
    process: int
    device: int
    activity: Ints  # an index into the profile's activities
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

    @property
    def rank(self) -> int | None:
        """The rank of the process, if anything tells it."""
        return self.profile.ranks.get(self.process)

    def times(self, mask: Mask) -> Union:
        """Return starts and ends of the activities in the mask."""
        return self.start[mask], self.end[mask]


def classify(profile: Profile) -> list[DeviceTimeline]:
    """Give each device activity its role, its range, its step and its bytes.

    Returns:
        One timeline for each process and device, sorted by rank (or by process) and device.
    """
    activities = profile.activities
    columns, is_lost, parts = _columns(profile)
    steps = _steps(profile)
    order = np.lexsort((activities.start, activities.device, activities.process))
    keys = activities.process[order], activities.device[order]
    first = np.flatnonzero(np.append(True, (keys[0][1:] != keys[0][:-1]) | (keys[1][1:] != keys[1][:-1])))
    here = {
        (int(keys[0][at[0]]), int(keys[1][at[0]])): order[at]
        for at in np.split(np.arange(order.size), first[1:])
    }
    has_ours = bool(profile.ranges.is_ours.any())
    timelines = []
    for label, process, device in _devices(profile, here):
        mine = here[process, device]
        timelines.append(
            DeviceTimeline(
                label=label,
                profile=profile,
                process=process,
                device=device,
                activity=mine,
                step=_step_of(steps.get(process, ()), activities.launched[mine]),
                parts=parts,
                steps=steps.get(process, ()),
                has_ours=has_ours,
                num_lost=int(is_lost[mine].sum()),
                **{name: column[mine] for name, column in columns.items()},
            )
        )
    return timelines


def _columns(profile: Profile) -> tuple[dict[str, Ints], Mask, tuple[str, ...]]:
    """The columns of a DeviceTimeline for all activities, which of them are lost, and the names of parts."""
    activities, ranges = profile.activities, profile.ranges
    labels = [label_of(text) for text in profile.texts]
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
    other_parts = [parts[COUNTED.sub("", text)] for text in profile.texts]
    range_parts = np.array([other_parts, own_parts], np.int64)[ranges.is_ours.astype(int), ranges.text]
    backward_parts = np.arange(len(parts))
    for name in ROLE_OF_RANGE:
        if name in parts:
            backward_parts[parts[name]] = parts[name + IN_BACKWARD]
    is_library = np.array([LIBRARY_RANGE.match(text) is not None for text in profile.texts], bool)
    launched, captured = _innermost(profile, ~ranges.is_ours & ~is_library[ranges.text])
    innermost = np.where(mine != NONE, mine, np.where(captured == NONE, launched, captured))
    is_region = ranges.is_ours & np.array([name in REGIONS for name in names], bool)[ranges.text]
    region_range = np.where(by_launch, *_innermost(profile, is_region))
    part, region = _pick(range_parts, innermost, 0), _pick(range_parts, region_range, 0)
    part = np.where(region == parts["backward"], backward_parts[part], part)

    # A range in which a graph was captured counts again in each launch of the graph.
    occasion = np.stack([mine, np.where(by_launch, 0, activities.launched)])
    payload_bytes = _pick(ranges.payload & PAYLOAD_BYTES, mine, 0)
    columns = {
        "start": activities.start,
        "end": activities.end,
        "stream": activities.stream,
        "role": role,
        "part": part,
        "region": region,
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
    kinds = np.array([kind_of_name(name) for name in profile.names], np.int64)[activities.name]
    kinds[activities.group != UNKNOWN] = NameKind.COMMUNICATION  # torch says that it is a collective
    of_name = np.array([ROLE_OF_NAME[kind] for kind in NameKind], np.int64)
    role = np.where(activities.kind == Kind.KERNEL, of_name[kinds], Role.COMPUTE)
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


def _steps(profile: Profile) -> dict[int, tuple[Step, ...]]:
    """The steps of each process, by start."""
    ranges = profile.ranges
    labels = [label_of(text) for text in profile.texts]
    is_step = np.array([label is not None and label["name"] == "step" for label in labels], bool)
    mine = np.flatnonzero(ranges.is_ours & is_step[ranges.text])
    seen: Counter[tuple[int, str]] = Counter()
    steps: dict[int, list[Step]] = {}
    for at in mine[np.argsort(ranges.start[mine], kind="stable")].tolist():
        label, process = labels[ranges.text[at]], int(ranges.process[at])
        assert label is not None
        schedule = label["detail"] or "step"
        step = Step(schedule, seen[process, schedule], int(ranges.start[at]), int(ranges.end[at]))
        steps.setdefault(process, []).append(step)
        seen[process, schedule] += 1
    return {process: tuple(each) for process, each in steps.items()}


def _step_of(steps: Sequence[Step], launched: Ints) -> Ints:
    """The step of each activity. A step ends synchronised, so all that its process launched in it belongs to it."""
    starts = np.array([step.start for step in steps], np.int64)
    ends = np.array([step.end for step in steps], np.int64)
    at = np.searchsorted(starts, launched, side="right") - 1
    return np.where(launched <= _pick(ends, at, np.iinfo(np.int64).min), at, NONE)


def _devices(profile: Profile, pairs: Collection[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Label, process and device of each timeline; the device is in the label if the process uses several."""
    devices = Counter(process for process, _ in pairs)
    found = []
    for process, device in pairs:
        rank = profile.ranks.get(process)
        kind, number = ("process", profile.pids[process]) if rank is None else ("rank", rank)
        needs_device = rank is None or devices[process] > 1
        label = f"{kind} {number}" + (f" device {device}" if needs_device else "")
        found.append((kind, number, device, process, label))
    return [(label, process, device) for *_, device, process, label in sorted(found)]
