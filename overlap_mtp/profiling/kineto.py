"""Reads a trace of torch.profiler (Kineto's JSON, as `export_chrome_trace` writes it): one process a file.

Our ranges are in it as `record_function` annotations, which carry no payload: bytes come from what torch notes on
the kernels of collectives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.profiling.trace import (
    LOST,
    UNKNOWN,
    Activities,
    Kind,
    Profile,
    ProfileError,
    Ranges,
    Texts,
)
from overlap_mtp.tracing import LABEL

Event = Mapping[str, Any]
KNOWN_SCHEMA = 1
KINDS = {"kernel": Kind.KERNEL, "gpu_memset": Kind.MEMSET, "gpu_memcpy": Kind.HOST_COPY}
CALLS = ("cuda_runtime", "cuda_driver", "runtime")
ANNOTATION = "user_annotation"
OLD_NAMES = {"memcpy": "gpu_memcpy", "memset": "gpu_memset"}  # categories of torch before 1.12
ELEMENT_BYTES = {"double": 8, "long": 8, "float": 4, "int": 4, "half": 2, "bfloat16": 2, "short": 2}  # else 1


def read_kineto(path: Path, text: str) -> Profile:
    """Reads the text of a trace. Raises ProfileError where it is none, is damaged, or has an unknown schema."""
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProfileError(f"{path.name}: not complete JSON ({error})") from error
    header = document if isinstance(document, dict) else {}
    events = header.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list) or not all(isinstance(event, dict) and "ph" in event for event in events):
        raise ProfileError(
            f"{path.name}: JSON, but not a trace of torch.profiler: it has no list traceEvents"
        )
    if header.get("schemaVersion", KNOWN_SCHEMA) != KNOWN_SCHEMA:
        raise ProfileError(
            f"{path.name}: schema version {header['schemaVersion']} is not known; known is {KNOWN_SCHEMA}"
        )
    try:
        return _profile(path.name, header, events)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path.name}: an event of the trace cannot be read ({error!r})") from error


def _profile(source: str, header: Event, events: list[Event]) -> Profile:
    names, texts, threads = Texts(), Texts(), Texts()
    timed = list(spans(events))
    calls: dict[int, tuple[int, int]] = {}
    for category, event in timed:
        if category in CALLS and "correlation" in event.get("args", {}):
            call = (_ns(event["ts"]), threads.index(str(event["tid"])))
            correlation = int(event["args"]["correlation"])
            calls[correlation] = min(call, calls.get(correlation, call))
    activities = [
        _activity(event, KINDS[category], names, calls) for category, event in timed if category in KINDS
    ]
    if not activities:
        raise ProfileError(
            f"{source}: the profile is empty: it holds no kernel, copy or memset (was the GPU traced?)"
        )
    ranges = [
        (
            *_interval(event),
            threads.index(str(event["tid"])),
            texts.index(event["name"]),
            LABEL.match(event["name"]) is not None,
        )
        for category, event in timed
        if category == ANNOTATION
    ]
    pid = next((e["pid"] for category, e in timed if category in CALLS and isinstance(e["pid"], int)), 0)
    rank = (header.get("distributedInfo") or {}).get("rank")
    start, end, thread, text, ours = np.array(ranges, np.int64).reshape(-1, 5).T
    nothing = np.zeros_like(start)
    return Profile(
        source,
        [pid],
        names.all(),
        texts.all(),
        _columns(activities),
        Ranges(start, end, nothing, thread, text, nothing, ours > 0),
        {} if rank is None else {0: int(rank)},
    )


def spans(events: list[Event]) -> Iterator[tuple[str, Event]]:
    """The events that last, with their categories in the names of today."""
    for event in events:
        if event["ph"] == "X" and "ts" in event:
            category = str(event.get("cat", "")).lower()
            yield OLD_NAMES.get(category, category), event


def _activity(event: Event, kind: Kind, names: Texts, calls: Mapping[int, tuple[int, int]]) -> list[int]:
    args = event.get("args", {})
    if kind is Kind.HOST_COPY:
        kind = _copy_kind(event["name"], args)
    launched, thread = calls.get(int(args.get("correlation", UNKNOWN)), (UNKNOWN, UNKNOWN))
    stream = args.get("stream", event["tid"])
    device = args.get("device", event["pid"])
    name = names.index(event["name"])
    captured = LOST if args.get("graph node id") else UNKNOWN
    return [*_interval(event), int(device), int(stream), kind, name, _bytes(args), launched, thread, captured]


def _copy_kind(name: str, args: Event) -> Kind:
    between = args.get("fromDevice", args.get("toDevice")) != args.get("toDevice", args.get("fromDevice"))
    if "PtoP" in name or ("DtoD" in name and between):
        return Kind.PEER_COPY
    return Kind.LOCAL_COPY if any(way in name for way in ("DtoD", "AtoD", "DtoA", "AtoA")) else Kind.HOST_COPY


def _bytes(args: Event) -> int:
    if "bytes" in args:
        return int(args["bytes"])
    if "In msg nelems" in args and "dtype" in args:
        return int(args["In msg nelems"]) * ELEMENT_BYTES.get(str(args["dtype"]).lower(), 1)
    return UNKNOWN


def _interval(event: Event) -> tuple[int, int]:
    start = _ns(event["ts"])
    return start, start + max(0, _ns(event.get("dur", 0)))


def _ns(microseconds: float | str) -> int:
    value = float(microseconds)
    if not math.isfinite(value):
        raise ValueError(f"a time is {microseconds}")
    return round(1000 * value)


def _columns(rows: list[list[int]]) -> Activities:
    start, end, device, stream, kind, name, num_bytes, launched, thread, captured = np.array(rows, np.int64).T
    process = np.zeros_like(start)
    return Activities(
        *(start, end, process, device, stream, kind, name, num_bytes),
        *(launched, thread),
        captured=captured,
        capture_thread=captured,
    )
