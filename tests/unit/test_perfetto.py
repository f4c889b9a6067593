"""The trace for viewers: every activity and range once, at its time, on a track where nothing crosses."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overlap_mtp.profiling import ProfileError, Report, perfetto, read_profile, report_on
from overlap_mtp.profiling.perfetto import COLOURS, write_trace

from handmade import Process, Span, Work, write_kineto, write_nsys

START = 10  # µs, of the first range
SPANS = [
    Span("step prefetch r0", START, 90),
    Span("trunk r0", 12, 40),
    Span("send-recv r0", 14, 15, payload=640),
    Span("somebody's", 30, 60, domain="other"),  # crosses the trunk
    Span("backward r0", 50, 80, thread=2),
    Span("open", 85, None, domain=None),
]
WORK = [
    Work("gemm", 13, 20, 40),
    Work("gemm", 13, 40, 41.001),  # begins when the other ends
    Work("put", 14.5, 25, 35.5, stream=18),
    Work("ncclDevKernel_AllGather", 16, 41.5, 50),
    Work("early", 31, 45, 60),  # begins before the kernel before it has ended, on the same stream
    Work("inner", 32, 46, 47),
    Work("Memcpy PtoP", 95, 100, 110, num_bytes=64),
    Work("Memset", 96, 110, 110),
]


def record(folder: Path, *processes: Process) -> Report:
    return report_on([read_profile(write_nsys(folder / "all.sqlite", processes))])


def written(report: Report, path: Path) -> list[dict[str, Any]]:
    """The events of the trace that is written for a report."""
    write_trace(report.timelines, path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    document = json.loads(data)
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    return document["traceEvents"]


def names_of(events: list[dict[str, Any]], kind: str) -> dict[int, str]:
    key = "pid" if kind == "process" else "tid"
    return {event[key]: event["args"]["name"] for event in events if event["name"] == f"{kind}_name"}


def crossing(events: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Events of one track that overlap in part. Viewers drop these."""
    tracks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(1000 * event["ts"])
            tracks[event["tid"]].append((start, start + round(1000 * event["dur"])))
    found, open_events = [], list[tuple[int, int]]()
    for track in tracks.values():
        assert track == sorted(track, key=lambda one: (one[0], -one[1]))  # outer before inner
        open_events.clear()
        for one in track:
            open_events[:] = [other for other in open_events if other[1] > one[0]]
            found += [(other, one) for other in open_events if other[1] < one[1]]
            open_events.append(one)
    return found


def test_a_trace_has_every_activity_and_range_once(tmp_path):
    """Name, kind, track, time, duration, and what else is known; times in µs since the first of them."""
    work = [*WORK, Work("Memcpy HtoD", 97, 120, 130, stream=9)]
    events = written(record(tmp_path, Process(77, SPANS, work)), tmp_path / "new.json.gz")
    assert names_of(events, "process") == {0: "rank 0"}
    tracks = names_of(events, "thread")
    found = [
        (tracks[event["tid"]], event["name"], event["cat"], event["ts"], event["dur"], event["args"])
        for event in events
        if event["ph"] == "X"
    ]
    step = {"schedule": "prefetch", "step": 0}
    in_trunk, first = {"range": "trunk", **step}, "ranges of thread 1"
    outside = {"range": "open"}
    assert found == [
        (first, "step prefetch r0", "range", 0, 80, {}),
        (first, "trunk r0", "range", 2, 28, {}),
        (first, "send-recv r0", "range", 4, 1, {"bytes": 640}),
        (f"{first}, crossing 1", "somebody's", "range", 20, 30, {}),
        (f"{first}, crossing 1", "open", "range", 75, 45, {}),  # until the recording ends
        ("ranges of thread 2", "backward r0", "range", 40, 30, {}),
        ("compute (stream 7)", "void gemm(int)", "compute", 10, 20, in_trunk),
        ("compute (stream 7)", "void gemm(int)", "compute", 30, 1.001, in_trunk),
        ("compute (stream 7)", "void ncclDevKernel_AllGather(int)", "model", 31.5, 8.5, in_trunk),
        ("compute (stream 7), crossing 1", "void early(int)", "compute", 35, 15, in_trunk),
        ("compute (stream 7)", "void inner(int)", "compute", 36, 1, in_trunk),
        ("compute (stream 7)", "peer copy", "model", 90, 10, {**outside, "bytes": 64}),
        ("compute (stream 7)", "memset", "compute", 100, 0, outside),
        (
            "exchange (stream 18)",
            "void put(int)",
            "exchange",
            15,
            10.5,
            {"range": "send-recv", **step, "bytes": 640},
        ),
        ("other (stream 9)", "host copy", "neither", 110, 10, outside),
    ]
    assert crossing(events) == []
    colours = {event["cat"]: event.get("cname") for event in events if event["ph"] == "X"}
    assert colours.pop("range") is None
    assert colours == {
        role.name.lower(): colour for role, colour in COLOURS.items() if role.name.lower() in colours
    }
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_each_rank_is_a_process_and_tracks_have_names_and_places_of_their_own(tmp_path):
    spans = [[Span(f"trunk r{rank}", 1, 9), Span(f"send-recv r{rank}", 14, 15)] for rank in (0, 3)]
    processes = [Process(5 + rank, spans[rank], WORK[:3], device=rank) for rank in (0, 1)]
    report = record(tmp_path, *processes)
    events = written(report, tmp_path / "a.json")
    assert names_of(events, "process") == {0: "rank 0", 3: "rank 3"}
    assert sorted(names_of(events, "thread").values()) == sorted(
        2 * ["ranges of thread 1", "compute (stream 7)", "exchange (stream 18)"]
    )
    numbers = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert (
        len({number for pair in numbers for number in pair}) == 2 + 6
    )  # all distinct: some viewers need that
    places = [event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"]
    assert places == sorted(set(places))
    assert {event["ph"] for event in events} == {"M", "X"}
    first = (tmp_path / "a.json").read_bytes()
    write_trace(report.timelines, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first


def test_a_process_on_two_devices_has_its_ranges_once(tmp_path):
    report = record(tmp_path, Process(5, SPANS[:3], WORK[:1]), Process(5, (), WORK[:2], device=1))
    events = written(report, tmp_path / "a.json")
    assert names_of(events, "process") == {0: "rank 0 device 0", 1: "rank 0 device 1"}
    assert Counter((event["pid"], event["cat"]) for event in events if event["ph"] == "X") == {
        **{(0, "range"): 3, (0, "compute"): 1, (1, "compute"): 2}
    }


def test_recordings_on_different_clocks_each_begin_at_0(tmp_path):
    early = WORK[:2]
    late = [replace(one, launched=513, start=one.start + 500, end=one.end + 500) for one in early]
    files = [
        write_nsys(tmp_path / name, [Process(5, (), work)]) for name, work in (("a", early), ("b", late))
    ]
    events = written(report_on([read_profile(file) for file in files]), tmp_path / "c.json")
    assert [event["ts"] for event in events if event["ph"] == "X"] == [0, 20, 0, 20]
    files = [
        write_kineto(tmp_path / f"{i}.json", Process(5, (), work), i) for i, work in enumerate((early, late))
    ]
    events = written(report_on([read_profile(file) for file in files]), tmp_path / "c.json")
    assert [event["ts"] for event in events if event["ph"] == "X"] == [0, 20, 500, 520]  # ranks on one clock


def test_nanoseconds_are_exact_after_a_day(tmp_path):
    day = 86_400e6
    work = [
        Work("gemm", 1, 1, 2),
        Work("gemm", 3, day + 1.001, day + 1.004),
        Work("gemm", 4, day + 1.004, day + 1.1),
    ]
    events = written(record(tmp_path, Process(5, (), work)), tmp_path / "a.json")
    times = [
        (round(1000 * event["ts"]), round(1000 * event["dur"])) for event in events if event["ph"] == "X"
    ]
    assert times == [(0, 1000), (86_400_000_000_001, 3), (86_400_000_000_004, 96)]


def test_memory_does_not_hold_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(perfetto, "BLOCK", 64)
    work = [Work(f"kernel {number % 7}", number, number, number + 1) for number in range(3000)]
    report = record(tmp_path, Process(5, [Span("trunk r0", 0, 4000)], work))
    tracemalloc.start()
    write_trace(report.timelines, tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.json").stat().st_size > 400_000
    assert peak < 300_000  # a list of the events takes five million bytes


def test_the_reader_refuses_what_is_written_for_viewers(tmp_path):
    """It holds no launches, which tie a kernel to its range, so a report on it would be another one."""
    written(record(tmp_path, Process(5, SPANS, WORK)), tmp_path / "a.json.gz")
    with pytest.raises(
        ProfileError, match="no kernel, copy or memset; events of these categories are not known"
    ):
        read_profile(tmp_path / "a.json.gz")
