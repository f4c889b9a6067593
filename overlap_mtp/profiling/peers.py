"""How long communication kernels waited for a peer that was late."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from overlap_mtp.profiling.classify import Lane, Role
from overlap_mtp.profiling.intervals import Ints
from overlap_mtp.profiling.nesting import NONE
from overlap_mtp.profiling.trace import UNKNOWN

LOCAL_PART = "pack"  # of the exchange: it waits for nobody


def peer_waits(lanes: Sequence[Lane]) -> list[Ints]:
    """For each activity of each lane its duration less that of its shortest participant (ns), or UNKNOWN.

    The n-th communication of a range in a step is taken for one and the same on all ranks that have as many there.
    Where numbers differ (ranks at the ends of a chain, say) or there is one rank alone, nothing is known.
    """
    waits = [np.full(lane.start.size, UNKNOWN, np.int64) for lane in lanes]
    everyone: dict[tuple[object, ...], list[tuple[int, Ints]]] = {}
    for number, lane in enumerate(lanes):
        for key, members in _groups(lane):
            everyone.setdefault(key, []).append((number, members))
    for parties in everyone.values():
        if len(parties) < 2 or len({members.size for _, members in parties}) > 1:
            continue
        durations = np.stack([lanes[n].end[members] - lanes[n].start[members] for n, members in parties])
        for (n, members), duration in zip(parties, durations, strict=True):
            waits[n][members] = duration - durations.min(axis=0)
    return waits


def _groups(lane: Lane) -> list[tuple[tuple[object, ...], Ints]]:
    """The communications of each range in each step, by start."""
    packs = [part for part, name in enumerate(lane.parts) if name == LOCAL_PART]
    shared = np.isin(lane.role, (Role.EXCHANGE, Role.MODEL)) & ~(
        (lane.role == Role.EXCHANGE) & np.isin(lane.part, packs)
    )
    members = np.flatnonzero(shared)
    keys = np.stack([lane.step[members], lane.role[members], lane.part[members]])
    distinct, inverse = np.unique(keys, axis=1, return_inverse=True)
    by_key = np.argsort(inverse.reshape(-1), kind="stable")
    groups = (
        np.split(members[by_key], np.cumsum(np.bincount(inverse.reshape(-1)))[:-1]) if members.size else []
    )
    return [
        ((*_step_key(lane, step), role, lane.parts[part]), group)
        for (step, role, part), group in zip(distinct.T.tolist(), groups, strict=True)
    ]


def _step_key(lane: Lane, step: int) -> tuple[str, int]:
    return ("", NONE) if step == NONE else (lane.steps[step].schedule, lane.steps[step].number)
