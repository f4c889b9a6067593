"""Read a trace of torch.profiler (Kineto's JSON, as `export_chrome_trace` writes it): one process in each file.

Our ranges are in it as `record_function` annotations, which carry no payload: bytes come from what torch notes on
the kernels of collectives, and so do their process groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, TextIO, overload

import numpy as np

from overlap_mtp.profiling.json_stream import EVENTS, read_items
from overlap_mtp.profiling.trace import (
    LONGEST_TIME_NS,
    LOST,
    UNKNOWN,
    UNNAMED,
    Activities,
    Group,
    Kind,
    Profile,
    ProfileError,
    Ranges,
    Texts,
    label_of,
    printable,
)

Event = Mapping[str, Any]
KNOWN_SCHEMA = 1
KINDS = {"kernel": Kind.KERNEL, "gpu_memset": Kind.MEMSET, "gpu_memcpy": Kind.HOST_COPY}
CALLS = {"cuda_runtime", "cuda_driver", "runtime", "hip_runtime", "xpu_runtime", "xpu_driver"}
CALLS |= {"privateuse1_runtime", "privateuse1_driver"}
ANNOTATION, OPERATOR = "user_annotation", "cpu_op"
OLD_NAMES = {"memcpy": "gpu_memcpy", "memset": "gpu_memset", "operator": OPERATOR}  # torch before 1.12
# Categories without device work of their own. Any other may hold some, so the report says that it is left out.
PASSED_OVER = {
    "",
    "trace",
    "gpu_user_annotation",
    "external_correlation",
    "cpu_instant_event",
    "python_function",
}
PASSED_OVER |= {"overhead", "cuda_sync", "cuda_event", "cuda_profiler_range", "ac2g", "fwdbwd", "python"}
ELEMENT_BYTES = {"double": 8, "long": 8, "float": 4, "int": 4, "half": 2, "bfloat16": 2, "short": 2}  # else 1
MOST_BYTES = 1 << 48  # more in one message is not believed


def read_kineto(name: str, file: TextIO) -> Profile:
    """Read a trace.

    Args:
        name: names the trace in messages and in the profile.
        file: the JSON.

    Raises:
        ProfileError: the text is no trace, or it is damaged, empty or of an unknown schema, or it holds several
            processes.
    """
    trace = _Trace(name)
    try:
        for category, event in spans(name, read_items(file), trace.header):
            trace.add(category, event)
    except ProfileError:
        raise
    except RecursionError as error:
        raise ProfileError(f"{name}: not complete JSON ({error})") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        if trace.is_adding:
            raise ProfileError(f"{name}: an event of the trace cannot be read ({error!r})") from error
        raise ProfileError(f"{name}: not complete JSON ({error})") from error
    try:
        return trace.profile()
    except ProfileError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ProfileError(f"{name}: a number of the trace cannot be read ({error!r})") from error


def spans(
    name: str, items: Iterator[tuple[str, Any]], header: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events that have a time, each after its category in today's names.

    The other entries of the file go into `header`, and are checked at the end.

    Raises:
        ProfileError: this is no trace of torch.profiler.
    """
    reason = f"{name}: JSON, but not a trace of torch.profiler: "
    has_events = False
    for key, value in items:
        if key != EVENTS:
            header[key] = value
            continue
        has_events = True
        if not isinstance(value, dict):
            raise ProfileError(f"{reason}traceEvents is not a list of objects")
        if value.get("ph") == "X" and "ts" in value:
            category = printable(value.get("cat")).lower()
            args = value.get("args")
            yield OLD_NAMES.get(category, category), {**value, "args": args if isinstance(args, dict) else {}}
    if (version := header.get("schemaVersion", KNOWN_SCHEMA)) != KNOWN_SCHEMA:
        raise ProfileError(f"{name}: schema version {version} is not known; known is {KNOWN_SCHEMA}")
    if not has_events and not header.get("schemaVersion"):
        raise ProfileError(f"{reason}it has no list traceEvents")
    if not isinstance(header.get("distributedInfo") or {}, dict):
        raise ProfileError(f"{reason}distributedInfo is not an object")


class _Trace:
    """What has been read so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.header: dict[str, Any] = {}
        self.is_adding = False  # an event, as opposed to reading on
        self._names, self._texts, self._threads = Texts(), Texts(), Texts()
        self._groups: dict[Group, int] = {}
        self._calls: dict[int, tuple[int, int]] = {}
        self._activities: list[list[int]] = []
        self._ranges: list[tuple[int, ...]] = []
        self._processes: dict[str, int] = {}  # each process that makes calls, and its id
        self._device_of: dict[int, int] = {}  # by correlation
        self._unread: Counter[str] = Counter()
        self._no_duration = self._backwards = 0

    def add(self, category: str, event: Event) -> None:
        self.is_adding = True
        if category in KINDS:
            self._activities.append(self._activity(event, KINDS[category]))
        elif category == ANNOTATION:
            thread = self._threads[str(event.get("tid"))]
            start, end = self._interval(event)
            self._ranges.append((start, max(start, end), thread, self._texts[printable(event.get("name"))]))
        elif category in CALLS or category == OPERATOR:
            pid = event.get("pid")
            self._processes.setdefault(str(pid), pid if isinstance(pid, int) else 0)
            if category != OPERATOR and (correlation := _integer(event["args"], "correlation")) is not None:
                call = (nanoseconds(event["ts"]), self._threads[str(event.get("tid"))])
                self._calls[correlation] = min(call, self._calls.get(correlation, call))
        elif category not in PASSED_OVER:
            self._unread[category[:40]] += 1
        self.is_adding = False

    def profile(self) -> Profile:
        if len(self._processes) > 1:
            pids = ", ".join(printable(pid)[:40] for pid in list(self._processes)[:8])
            raise ProfileError(
                f"{self._name}: the trace holds {len(self._processes)} processes ({pids}), whose kernels cannot be "
                "told apart: give one file for each rank, as torch.profiler writes them"
            )
        unread = ", ".join(sorted(self._unread)[:8])
        if not self._activities and unread:
            raise ProfileError(
                f"{self._name}: the profile holds no kernel, copy or memset; events of these categories are not "
                f"known: {unread}"
            )
        activities = np.array(self._activities, np.int64).reshape(-1, 11)
        calls = [self._calls.get(each, (UNKNOWN, UNKNOWN)) for each in activities[:, 8].tolist()]
        launched, thread = np.array(calls, np.int64).reshape(-1, 2).T
        captured = activities[:, 9]
        range_start, range_end, range_thread, text = np.array(self._ranges, np.int64).reshape(-1, 4).T
        is_ours = np.array([label_of(one) is not None for one in self._texts], bool)[text]
        zeros = np.zeros_like(range_start)
        distributed = self.header.get("distributedInfo") or {}
        rank = _integer(distributed, "rank")
        base = nanoseconds(Decimal(_integer(self.header, "baseTimeNanoseconds") or 0) / 1000)
        launched = np.where(launched == UNKNOWN, UNKNOWN, launched + base)
        return Profile(
            self._name,
            list(self._processes.values()) or [0],
            list(self._names),
            list(self._texts),
            Activities(
                start=activities[:, 0] + base,
                end=activities[:, 1] + base,
                process=activities[:, 2],
                device=activities[:, 3],
                stream=activities[:, 4],
                kind=activities[:, 5],
                name=activities[:, 6],
                num_bytes=activities[:, 7],
                launched=launched,
                thread=thread,
                captured=captured,
                capture_thread=captured,
                group=activities[:, 10],
            ),
            Ranges(range_start + base, range_end + base, zeros, range_thread, text, zeros, is_ours),
            {} if rank is None else {0: rank},
            groups=list(self._groups),
            world_size=_integer(distributed, "world_size"),
            clock="the host's",
            notes=list(self._notes(unread)),
        )

    def _notes(self, unread: str) -> Iterator[str]:
        if unread:
            yield f"{self._name}: events of these categories are not known, and left out: {unread}."
        if self._no_duration:
            yield f"{self._name}: {self._no_duration:,} activities have no duration, and count as no time."
        if self._backwards:
            yield f"{self._name}: {self._backwards:,} activities end before they begin, and count as no time."

    def _activity(self, event: Event, kind: Kind) -> list[int]:
        """Start, end, process, device, stream, kind, name, bytes, correlation, captured, group."""
        args, name = event["args"], printable(event.get("name"))
        if kind is Kind.HOST_COPY:
            kind = _copy_kind(name, args)
        self._no_duration += event.get("dur") is None
        start, end = self._interval(event)
        self._backwards += end < start
        device = _integer(args, "device", _integer(event, "pid", 0))
        stream = _integer(args, "stream", _integer(event, "tid", 0))
        correlation = _integer(args, "correlation", UNKNOWN)
        is_graph = bool(args.get("graph node id"))
        if kind is Kind.KERNEL and correlation > 0 and not is_graph:
            other = self._device_of.setdefault(correlation, device)
            if other != device:
                raise ProfileError(
                    f"{self._name}: kernels on the devices {other} and {device} have one correlation number "
                    f"({correlation}), so two processes are in the trace: give one file for each rank"
                )
        group = self._group(args)
        captured = LOST if is_graph else UNKNOWN
        numbers = (self._names[name], _bytes(args), correlation, captured, group)
        return [start, max(start, end), 0, device, stream, kind, *numbers]

    def _group(self, args: Event) -> int:
        """The number of a collective's process group, or UNKNOWN."""
        collective = printable(args.get("Collective name"))
        if collective == UNNAMED:
            return UNKNOWN
        listed = printable(args.get("Process Group Ranks"))
        ranks = () if "..." in listed else tuple(int(rank) for rank in re.findall(r"\b\d{1,9}\b", listed))
        group = Group(printable(args.get("Process Group Name")), ranks, collective)
        return self._groups.setdefault(group, len(self._groups))

    def _interval(self, event: Event) -> tuple[int, int]:
        start = nanoseconds(event["ts"])
        duration = event.get("dur")
        return start, start + (0 if duration is None else nanoseconds(duration))


def _copy_kind(name: str, args: Event) -> Kind:
    between = args.get("fromDevice", args.get("toDevice")) != args.get("toDevice", args.get("fromDevice"))
    if "PtoP" in name or ("DtoD" in name and between):
        return Kind.PEER_COPY
    return Kind.LOCAL_COPY if any(way in name for way in ("DtoD", "AtoD", "DtoA", "AtoA")) else Kind.HOST_COPY


def _bytes(args: Event) -> int:
    counted = _integer(args, "bytes")
    if counted is None and (elements := _integer(args, "In msg nelems")) is not None and "dtype" in args:
        counted = elements * ELEMENT_BYTES.get(str(args["dtype"]).lower(), 1)
    return counted if counted is not None and 0 <= counted < MOST_BYTES else UNKNOWN


@overload
def _integer(values: Event, name: str, default: int) -> int: ...
@overload
def _integer(values: Event, name: str) -> int | None: ...
def _integer(values: Event, name: str, default: int | None = None) -> int | None:
    """A whole number, also if it is written as text."""
    value = values.get(name)
    return default if value is None else int(value)


def nanoseconds(microseconds: Any) -> int:
    """Return a time in ns, exactly: a float does not hold µs since 1970 to the ns.

    Raises:
        ValueError, ArithmeticError: it is no number, or not finite, or too large to add.
    """
    if isinstance(microseconds, bool):
        raise ValueError(f"a time is {microseconds}")
    value = Decimal(microseconds)
    if not abs(value) <= LONGEST_TIME_NS // 1000:  # false for NaN, too
        raise ValueError(f"a time is {str(microseconds)[:40]}")
    return int((value * 1000).to_integral_value())
