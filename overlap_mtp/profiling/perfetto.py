"""Write activities and ranges as a trace that the Perfetto viewer (ui.perfetto.dev) and chrome://tracing open.

The format is the Trace Event Format. A process is a device, and a track is a stream or a host thread. Viewers draw a
track right only if its events are apart or one in the other, so what crosses another event goes to a further track.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.profiling.classify import PAYLOAD_BYTES, DeviceTimeline, Role
from overlap_mtp.profiling.intervals import NONE, Ints
from overlap_mtp.profiling.streams import named_streams
from overlap_mtp.profiling.trace import UNNAMED, Profile

COLOURS = {  # names that chrome://tracing knows; the Perfetto viewer takes colours from the names of events
    Role.COMPUTE: "thread_state_runnable",  # blue
    Role.EXCHANGE: "terrible",  # red
    Role.LOCAL: "thread_state_running",  # green
    Role.MODEL: "thread_state_uninterruptible",  # violet
    Role.EXPERTS: "detailed_memory_dump",  # a darker violet
    Role.OPAQUE: "thread_state_unknown",  # brown
    Role.NEITHER: "grey",
}
SUFFIXES = (".json", ".json.gz")
COMPRESSION = 6  # gzip's best takes four times as long for a tenth less
BLOCK = 4096  # events that are in memory at once
Event = dict[str, Any]
Timed = tuple[int, int, Event]  # start and end in ns, and what else an event says


def can_write(path: Path) -> bool:
    """Return whether a file's name is one of a trace."""
    return path.name.lower().endswith(SUFFIXES)


def write_trace(timelines: Sequence[DeviceTimeline], path: Path) -> None:
    """Write a trace. Memory holds a few events at a time, however many there are.

    Args:
        timelines: of one recording or several. Each clock begins with its first event.
        path: the file; it is gzipped if its name ends in `.gz`. The same timelines always give the same bytes.
    """
    with ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("wb", buffering=0))
        if path.suffix.lower() == ".gz":
            raw = stack.enter_context(gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0))
        file = stack.enter_context(io.TextIOWrapper(io.BufferedWriter(raw, 1 << 16), "utf-8"))
        separator = '{"traceEvents":[\n'
        for event in _events(timelines):
            file.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        file.write('\n],"displayTimeUnit":"ns"}\n')


def _events(timelines: Sequence[DeviceTimeline]) -> Iterator[Event]:
    """All events, track by track. Numbers of processes and tracks are distinct: some viewers need that."""
    begins, numbers = _begins(timelines), _numbers(timelines)
    tracks = count(max(numbers, default=0) + 1)
    seen: set[tuple[int, int]] = set()
    for number, timeline in zip(numbers, timelines, strict=True):
        yield from _named("process", timeline.label, number, number, 0)
        begin, profile = begins[timeline.profile.clock], timeline.profile
        if (id(profile), timeline.process) not in seen:  # a process that uses two devices has its ranges once
            seen.add((id(profile), timeline.process))
            for place, members in enumerate(_threads(profile, timeline.process), 1):
                ranges = _ranges(profile, members)
                yield from _track(f"ranges of thread {place}", number, tracks, begin, ranges)
        for stream, does in named_streams(timeline, np.arange(timeline.start.size)).items():
            work = _work(timeline, np.flatnonzero(timeline.stream == stream))
            yield from _track(f"{does} (stream {stream})", number, tracks, begin, work)


def _begins(timelines: Sequence[DeviceTimeline]) -> dict[str, int]:
    """For each clock the time that is 0 in the trace."""
    begins: dict[str, int] = {}
    for profile in (timeline.profile for timeline in timelines):
        starts = np.concatenate([profile.activities.start, profile.ranges.start])
        begins[profile.clock] = min(int(starts.min()), begins.get(profile.clock, int(starts.min())))
    return begins


def _numbers(timelines: Sequence[DeviceTimeline]) -> list[int]:
    """A number for each process: its rank, if that tells all of them apart."""
    ranks = [timeline.rank for timeline in timelines if timeline.rank is not None]
    return ranks if len(set(ranks)) == len(timelines) else list(range(len(timelines)))


def _named(kind: str, name: str, order: int, process: int, track: int) -> Iterator[Event]:
    """The events that name a process or a thread, and put it in its place."""
    where = {"ph": "M", "pid": process, "tid": track}
    yield {"name": f"{kind}_name", **where, "args": {"name": name}}
    yield {"name": f"{kind}_sort_index", **where, "args": {"sort_index": order}}


def _track(
    name: str, process: int, tracks: Iterator[int], begin: int, events: Iterable[Timed]
) -> Iterator[Event]:
    """The events of a stream or a thread, on as many tracks as it takes to keep them from crossing.

    Args:
        name: of the tracks.
        process: which they belong to.
        tracks: gives the number of the next track.
        begin: the time that is 0 in the trace.
        events: sorted by start; of two that start together, the longer comes first.
    """
    lanes: list[tuple[int, list[int]]] = []  # number of the track, and the ends of its open events
    for start, end, event in events:
        lane = next((one for one in lanes if _fits(one[1], start, end)), None)
        if lane is None:
            lane = (next(tracks), [])
            lanes.append(lane)
            title = name if len(lanes) == 1 else f"{name}, crossing {len(lanes) - 1}"
            yield from _named("thread", title, lane[0], process, lane[0])
        track, ends = lane
        ends.append(end)
        times = {
            "ts": (start - begin) / 1000,
            "dur": (end - start) / 1000,
        }  # µs; ns are exact for a hundred days
        yield {"ph": "X", "pid": process, "tid": track, **times, **event}


def _fits(ends: list[int], start: int, end: int) -> bool:
    """Return whether an event lies within the innermost event of a track that is open; drop those that are not."""
    while ends and ends[-1] <= start:
        ends.pop()
    return not ends or end <= ends[-1]


def _work(timeline: DeviceTimeline, members: Ints) -> Iterator[Timed]:
    """The activities of a device."""
    names, name_of = timeline.profile.names, timeline.profile.activities.name[timeline.activity]
    kinds = {role: {"cat": role.name.lower(), "cname": colour} for role, colour in COLOURS.items()}
    columns = (timeline.start, timeline.end, name_of, timeline.role, timeline.part, timeline.step)
    for start, end, name, role, part, step, num_bytes in _in_order(members, *columns, timeline.num_bytes):
        args: dict[str, str | int] = {"range": timeline.parts[part]}
        if step != NONE:
            args |= {"schedule": timeline.steps[step].schedule, "step": timeline.steps[step].number}
        if num_bytes > 0:
            args["bytes"] = num_bytes
        label = "kernel without a name" if names[name] == UNNAMED else names[name]
        yield start, end, {"name": label, **kinds[Role(role)], "args": args}


def _threads(profile: Profile, process: int) -> list[Ints]:
    """The ranges of each thread of a process, as indices; the thread that has the first range comes first."""
    mine = np.flatnonzero(profile.ranges.process == process)
    threads = np.unique(profile.ranges.thread[mine])
    each = [mine[profile.ranges.thread[mine] == thread] for thread in threads]
    return sorted(each, key=lambda members: int(profile.ranges.start[members].min()))


def _ranges(profile: Profile, members: Ints) -> Iterator[Timed]:
    """The ranges of a thread. One that was open when the recording stopped ends with it."""
    ranges = profile.ranges
    last = max(int(profile.activities.end.max()), int(ranges.start.max()))
    end, num_bytes = np.minimum(ranges.end, last), np.where(ranges.is_ours, ranges.payload & PAYLOAD_BYTES, 0)
    for start, stop, text, size in _in_order(members, ranges.start, end, ranges.text, num_bytes):
        args = {"bytes": size} if size else {}
        yield start, stop, {"name": profile.texts[text], "cat": "range", "args": args}


def _in_order(members: Ints, start: Ints, end: Ints, *more: Ints) -> Iterator[tuple[int, ...]]:
    """The members' values of some columns, as `_track` wants them sorted, a block at a time."""
    order = members[np.lexsort((-end[members], start[members]))]
    for at in range(0, order.size, BLOCK):
        block = order[at : at + BLOCK]
        yield from zip(*(column[block].tolist() for column in (start, end, *more)), strict=True)
