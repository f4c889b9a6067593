"""Read a trace of torch.profiler (Kineto's JSON, as `export_chrome_trace` writes it): one process in each file.

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

from overlap_mtp.profiling.trace import LOST, UNKNOWN, Activities, Kind, Profile, ProfileError, Ranges, Texts
from overlap_mtp.tracing import LABEL

Event = Mapping[str, Any]
KNOWN_SCHEMA = 1
KINDS = {"kernel": Kind.KERNEL, "gpu_memset": Kind.MEMSET, "gpu_memcpy": Kind.HOST_COPY}
CALLS = ("cuda_runtime", "cuda_driver", "runtime")
ANNOTATION = "user_annotation"
OLD_NAMES = {"memcpy": "gpu_memcpy", "memset": "gpu_memset"}  # categories of torch before 1.12
ELEMENT_BYTES = {"double": 8, "long": 8, "float": 4, "int": 4, "half": 2, "bfloat16": 2, "short": 2}  # else 1


def read_kineto(path: Path, text: str) -> Profile:
    """Read a trace.

    Args:
        path: names the trace in messages and in the profile.
        text: the JSON.

    Raises:
        ProfileError: the text is no trace, or it is damaged, empty or of an unknown schema.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProfileError(f"{path.name}: not complete JSON ({error})") from error
    header = document if isinstance(document, dict) else {"traceEvents": document}
    events = header.get("traceEvents")
    if not isinstance(events, list) or not all(isinstance(event, dict) and "ph" in event for event in events):
        raise ProfileError(
            f"{path.name}: JSON, but not a trace of torch.profiler: it has no list traceEvents"
        )
    if (version := header.get("schemaVersion", KNOWN_SCHEMA)) != KNOWN_SCHEMA:
        raise ProfileError(f"{path.name}: schema version {version} is not known; known is {KNOWN_SCHEMA}")
    try:
        return _profile(path.name, header, list(spans(events)))
    except ProfileError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProfileError(f"{path.name}: an event of the trace cannot be read ({error!r})") from error


def spans(events: list[Event]) -> Iterator[tuple[str, Event]]:
    """Yield the events that have a duration, each after its category in today's names."""
    for event in events:
        if event["ph"] == "X" and "ts" in event:
            category = str(event.get("cat", "")).lower()
            yield OLD_NAMES.get(category, category), event


def _profile(source: str, header: Event, timed: list[tuple[str, Event]]) -> Profile:
    names, texts, threads = Texts(), Texts(), Texts()
    calls: dict[int, tuple[int, int]] = {}
    for category, event in timed:
        if category in CALLS and "correlation" in event.get("args", {}):
            call = (_ns(event["ts"]), threads[str(event["tid"])])
            correlation = int(event["args"]["correlation"])
            calls[correlation] = min(call, calls.get(correlation, call))
    activities = [
        _activity(event, KINDS[category], names, calls) for category, event in timed if category in KINDS
    ]
    ranges = [
        (*_interval(event), threads[str(event["tid"])], texts[event["name"]])
        for category, event in timed
        if category == ANNOTATION
    ]
    pid = next((e["pid"] for category, e in timed if category in CALLS and isinstance(e["pid"], int)), 0)
    rank = (header.get("distributedInfo") or {}).get("rank")
    start, end, thread, text = np.array(ranges, np.int64).reshape(-1, 4).T
    is_ours = np.array([LABEL.match(one) is not None for one in texts], bool)[text]
    zeros = np.zeros_like(start)
    return Profile(
        source,
        [pid],
        list(names),
        list(texts),
        Activities(*np.array(activities, np.int64).reshape(-1, 12).T),
        Ranges(start, end, zeros, thread, text, zeros, is_ours),
        {} if rank is None else {0: int(rank)},
    )


def _activity(event: Event, kind: Kind, names: Texts, calls: Mapping[int, tuple[int, int]]) -> list[int]:
    """The fields of Activities."""
    args = event.get("args", {})
    if kind is Kind.HOST_COPY:
        kind = _copy_kind(event["name"], args)
    device, stream = int(args.get("device", event["pid"])), int(args.get("stream", event["tid"]))
    call = calls.get(int(args.get("correlation", UNKNOWN)), (UNKNOWN, UNKNOWN))
    captured = LOST if args.get("graph node id") else UNKNOWN
    name = names[event["name"]]
    return [*_interval(event), 0, device, stream, kind, name, _bytes(args), *call, captured, captured]


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
