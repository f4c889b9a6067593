"""Name the CUDA streams of a device after what they mostly do."""

from __future__ import annotations

import numpy as np

from overlap_mtp.profiling.classify import DeviceTimeline, Role
from overlap_mtp.profiling.intervals import Ints, sum_each

NAMES = {  # in the order in which streams are shown, but only the busiest of those that compute comes first
    Role.COMPUTE: "compute",
    Role.EXCHANGE: "exchange",
    Role.LOCAL: "unroll",
    Role.MODEL: "communication",
    Role.EXPERTS: "experts",
    Role.OPAQUE: "CUDA graphs",
    Role.NEITHER: "other",
}


def named_streams(timeline: DeviceTimeline, members: Ints, most: int | None = None) -> dict[int, str]:
    """Return the number of each stream and what it does for longest.

    Args:
        timeline: of the device.
        members: the activities that count, as indices into the timeline.
        most: return at most as many streams: those with the most work.
    """
    numbers, stream = np.unique(timeline.stream[members], return_inverse=True)
    number_of = np.zeros(len(Role), np.int64)
    number_of[list(NAMES)] = np.arange(len(NAMES))
    group = stream * len(NAMES) + number_of[timeline.role[members]]
    time = timeline.end[members] - timeline.start[members]
    busy = sum_each(group, time, numbers.size * len(NAMES)).reshape(-1, len(NAMES))
    does = busy.argmax(1)  # of two that take as long, the one that is shown first
    total = busy.sum(1)
    shown = np.argsort(-total, kind="stable")[:most]
    names = list(NAMES.values())
    computes = np.flatnonzero(does == 0)
    place = does.copy()
    place[computes[np.argsort(-total[computes], kind="stable")[1:]]] = len(NAMES)
    order = shown[np.lexsort((numbers[shown], -total[shown], place[shown]))]
    return {int(numbers[at]): names[does[at]] for at in order.tolist()}
