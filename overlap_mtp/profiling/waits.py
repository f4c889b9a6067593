"""How long the kernels of a rank wait for those of its peers, as far as a profile tells which kernels belong together.

Kernels are paired by process group, collective, step and range, and then by count. The pair must also overlap in
time, because no participant of a collective ends before the last one begins. If anything is missing, the wait is not
known: the group (a profile of Nsight Systems does not hold it; then only two ranks can be paired, which must be each
other's peers), a rank of it, equal counts, or a common clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from overlap_mtp.profiling.classify import COMMUNICATION, IN_BACKWARD, DeviceTimeline, Mask, Role
from overlap_mtp.profiling.intervals import NONE, Ints
from overlap_mtp.profiling.trace import UNKNOWN, Group

WAITS_FOR_NOBODY = "pack"  # the range of the exchange whose kernels have no peer
ONE_TO_ONE = ("send", "recv", "sendrecv")  # collectives with other participants than the ranks of the group
Key = tuple[tuple[str, int], int, str, str, Group | None, int | None, str]
Members = dict[int, list[int]]  # timeline -> its activities, in order


def peer_waits(timelines: Sequence[DeviceTimeline]) -> list[Ints]:
    """Return for each activity of each timeline its duration less that of its shortest participant (ns), or UNKNOWN.

    Kernels of the exchange in one step that did not run at the same time did not wait for each other: their wait
    is 0. Traces of torch.profiler do not tell their hosts, whose clocks may differ. So, in several files, this holds
    only if others of the step did run at the same time.

    Args:
        timelines: those of one recording.
    """
    waits = [np.full(timeline.start.size, UNKNOWN, np.int64) for timeline in timelines]
    everyone: dict[Key, Members] = {}
    for number, timeline in enumerate(timelines):
        _collect(number, timeline, everyone)
    num_communicating = len({number for members in everyone.values() for number in members})
    paired = [
        (key, members, _durations(members, timelines))
        for key, members in everyone.items()
        if _are_all_there(key, members, timelines, num_communicating)
    ]
    met = {(key[0], frozenset(members)) for key, members, (_, meet) in paired if meet.any()}
    for key, members, (own, meet) in paired:
        agree = _is_one_file(members, timelines) or (key[0], frozenset(members)) in met
        ran_apart = key[1] == Role.EXCHANGE and agree and _steps_meet(key, members, timelines)
        found = np.where(meet, own - own.min(0), 0 if ran_apart else UNKNOWN)
        for (number, each), wait in zip(members.items(), found, strict=True):
            waits[number][each] = wait
    return waits


def has_peer(timeline: DeviceTimeline) -> Mask:
    """Return which activities of a timeline have a peer that they may wait for."""
    is_alone = np.array(
        [part.removesuffix(IN_BACKWARD) == WAITS_FOR_NOBODY for part in timeline.parts], bool
    )[timeline.part]
    mask: Mask = np.isin(timeline.role, COMMUNICATION) & ((timeline.role != Role.EXCHANGE) | ~is_alone)
    return mask


def _collect(number: int, timeline: DeviceTimeline, everyone: dict[Key, Members]) -> None:
    """Add the activities of a timeline that have a peer."""
    profile = timeline.profile
    steps = [(step.schedule, step.number) for step in timeline.steps] + [("", NONE)]
    names = profile.activities.name[timeline.activity]
    groups = profile.activities.group[timeline.activity]
    for at in np.flatnonzero(has_peer(timeline)).tolist():
        role, group = int(timeline.role[at]), int(groups[at])
        key = (
            steps[timeline.step[at]],
            role,
            timeline.parts[timeline.part[at]],
            "" if role == Role.EXCHANGE else profile.names[names[at]],
            None if group == UNKNOWN else profile.groups[group],
            profile.world_size,
            profile.clock,
        )
        everyone.setdefault(key, {}).setdefault(number, []).append(at)


def _are_all_there(
    key: Key, members: Members, timelines: Sequence[DeviceTimeline], num_communicating: int
) -> bool:
    """Whether these are all participants, each as often as the others."""
    group, world_size = key[4:6]
    if len(members) < 2 or len({len(each) for each in members.values()}) > 1:
        return False
    if group is None or not group.ranks:
        return len(members) == 2 and num_communicating == 2 and world_size in (None, 2)
    if len(group.ranks) > 2 and (key[1] == Role.EXCHANGE or group.collective.lower() in ONE_TO_ONE):
        return False
    ranks = [timelines[number].rank for number in members]
    return len(ranks) == len(group.ranks) and set(ranks) == set(group.ranks)


def _durations(members: Members, timelines: Sequence[DeviceTimeline]) -> tuple[Ints, Mask]:
    """How long each activity takes, and whether those that belong together run at the same time."""
    start = np.stack([timelines[number].start[each] for number, each in members.items()])
    end = np.stack([timelines[number].end[each] for number, each in members.items()])
    return end - start, start.max(0) <= end.min(0)


def _is_one_file(members: Members, timelines: Sequence[DeviceTimeline]) -> bool:
    """Whether one file holds all of these, so that they surely have one clock."""
    return len({id(timelines[number].profile) for number in members}) == 1


def _steps_meet(key: Key, members: Members, timelines: Sequence[DeviceTimeline]) -> bool:
    """Whether the step of these activities runs on all members at the same time."""
    if key[0][1] == NONE:
        return False
    steps = [timelines[number].steps[timelines[number].step[each[0]]] for number, each in members.items()]
    return bool(max(step.start for step in steps) <= min(step.end for step in steps))
