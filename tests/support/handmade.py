"""Write profiles with known answers, in both formats. All times are in µs."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MACHINE = 0x11 << 56
COPY_KINDS = {"HtoD": 1, "DtoH": 2, "DtoD": 8, "PtoP": 10}
ACTIVITY = "start, end, deviceId, streamId, correlationId, globalPid, contextId"
TABLES = {  # the columns that are read, and a few others
    "StringIds": "id, value",
    "META_DATA_EXPORT": "name, value",
    "TARGET_INFO_SYSTEM_ENV": "name, value",
    "ProcessStreams": "filenameId, contentId",
    "NVTX_EVENTS": "start, end, eventType, text, globalTid, textId, domainId, uint64Value",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start, end, globalTid, correlationId, nameId",
    "CUPTI_ACTIVITY_KIND_KERNEL": f"{ACTIVITY}, graphNodeId, shortName, demangledName",
    "CUPTI_ACTIVITY_KIND_MEMCPY": f"{ACTIVITY}, graphNodeId, bytes, copyKind",
    "CUPTI_ACTIVITY_KIND_MEMSET": f"{ACTIVITY}, graphNodeId, bytes",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{ACTIVITY}, graphId",
    "CUDA_GRAPH_NODE_EVENTS": "start, globalTid, nameId, graphNodeId, originalGraphNodeId",
    "DIAGNOSTIC_EVENT": "timestamp, timestampType, source, severity, text, globalPid",
}


@dataclass(frozen=True)
class Work:
    """A kernel, copy ("Memcpy PtoP"), "Memset" or whole "CUDA graph", and when the host launched it."""

    name: str
    launched: float
    start: float
    end: float
    stream: int = 7
    thread: int = 1
    num_bytes: int = 0
    graph_node: int | None = None
    correlation: int | None = None  # by default one of its own


@dataclass(frozen=True)
class Span:
    """A host range."""

    text: str
    start: float
    end: float | None
    thread: int = 1
    payload: int = 0
    domain: str | None = "overlap_mtp"


@dataclass(frozen=True)
class Process:
    """One process on one device."""

    pid: int
    spans: Sequence[Span] = ()
    work: Sequence[Work] = ()
    device: int = 0
    nodes: Sequence[
        tuple[int, int | None, float]
    ] = ()  # graph node, the one it was copied from, when it was made
    extra_calls: Sequence[float] = ()  # times of calls that launch nothing


class _Export:
    """Rows by table: a table without rows is not made, as in real exports."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Any, ...]]] = {}
        self._strings: dict[str, int] = {}

    def add(self, table: str, *row: Any) -> None:
        self.rows.setdefault(table, []).append(row)

    def string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            self.add("StringIds", self._strings[text], text)
        return self._strings[text]

    def process(self, process: Process) -> None:
        pid = MACHINE | process.pid << 24
        domains = list(dict.fromkeys([None, *(span.domain for span in process.spans)]))
        for number, domain in enumerate(domains[1:], 1):
            self.add("NVTX_EVENTS", 0, None, 75, domain, pid | 1, None, number, None)
        for span in process.spans:
            end = None if span.end is None else ns(span.end)
            names = (self.string(span.text), domains.index(span.domain), span.payload or None)
            self.add("NVTX_EVENTS", ns(span.start), end, 59, None, pid | span.thread, *names)
        for node, original, time in process.nodes:
            self.add("CUDA_GRAPH_NODE_EVENTS", ns(time), pid | 1, self.string("node"), node, original)
        calls = [(time, 1, 1) for time in process.extra_calls]
        for number, work in enumerate(process.work):
            calls.append((work.launched, work.thread, work.correlation or 100 + number))
            place = (process.device, work.stream, work.correlation or 100 + number, pid, 1)
            self._work(work, (ns(work.start), ns(work.end), *place))
        for time, thread, correlation in dict.fromkeys(calls):
            names = (pid | thread, correlation, self.string("cudaLaunchKernel_v7000"))
            self.add("CUPTI_ACTIVITY_KIND_RUNTIME", ns(time), ns(time) + 500, *names)

    def _work(self, work: Work, row: tuple[int, ...]) -> None:
        kind, *way = work.name.split()
        if work.name == "CUDA graph":
            self.add("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", *row, 1)
        elif kind == "Memcpy":
            copy_kind = COPY_KINDS[way[0]]
            self.add("CUPTI_ACTIVITY_KIND_MEMCPY", *row, work.graph_node, work.num_bytes, copy_kind)
        elif kind == "Memset":
            self.add("CUPTI_ACTIVITY_KIND_MEMSET", *row, work.graph_node, work.num_bytes)
        else:
            names = (self.string(work.name), self.string(f"void {work.name}(int)"))
            self.add("CUPTI_ACTIVITY_KIND_KERNEL", *row, work.graph_node, *names)


def write_nsys(
    path: Path, processes: Sequence[Process], version: str = "3.20.2", said: Sequence[str] = ()
) -> Path:
    """Write an SQLite export of Nsight Systems, with an environment such as a real one has.

    Args:
        path: the file.
        processes: what ran.
        version: of the schema.
        said: what Nsight Systems says of its recording.
    """
    export = _Export()
    for process in processes:
        export.process(process)
    export.add("META_DATA_EXPORT", "EXPORT_SCHEMA_VERSION", version)
    export.add("META_DATA_EXPORT", "EXPORT_COMMAND", "/home/someone/nsys export secret-host.nsys-rep")
    export.add("TARGET_INFO_SYSTEM_ENV", "Hostname", "secret-host")
    export.add("ProcessStreams", export.string("/home/someone/log"), export.string("TOKEN=x"))
    for text in said:
        export.add("DIAGNOSTIC_EVENT", 0, 1, 2, 3, text, 4)
    with closing(sqlite3.connect(path)) as db:
        for table, rows in export.rows.items():
            db.execute(f"CREATE TABLE {table} ({TABLES[table]})")
            db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.commit()
    return path


def kineto_document(process: Process, rank: int | None = None) -> dict[str, Any]:
    """Return a trace of torch.profiler of one process."""
    machine = {"ph": "M", "ts": 0, "pid": process.pid, "tid": 0, "args": {"name": "/home/x/python"}}
    events: list[dict[str, Any]] = [{"name": "process_name", **machine}]

    def add(cat: str, name: str, where: tuple[int, int], start: float, end: float, **args: Any) -> None:
        event = {"cat": cat, "name": name, "pid": where[0], "tid": where[1], "args": args}
        events.append({"ph": "X", "ts": start, "dur": end - start, **event})

    for span in process.spans:
        end = span.start + 1e6 if span.end is None else span.end
        add("user_annotation", span.text, (process.pid, span.thread), span.start, end, index=1)
    for number, work in enumerate(process.work):
        call = {"correlation": work.correlation or 100 + number}
        add("cuda_runtime", "launch", (process.pid, work.thread), work.launched, work.launched + 0.5, **call)
        category, args = "kernel", {"device": process.device, "stream": work.stream, **call}
        if work.name.startswith(("Memcpy", "Memset")):
            category, args["bytes"] = f"gpu_{work.name[:6].lower()}", work.num_bytes
        elif work.num_bytes:
            args |= {"In msg nelems": work.num_bytes // 8, "dtype": "Long", "Collective name": "send"}
        add(category, work.name, (process.device, work.stream), work.start, work.end, **args)
    document = {"schemaVersion": 1, "traceName": "/home/someone/rank0.json", "traceEvents": events}
    return document if rank is None else {**document, "distributedInfo": {"backend": "nccl", "rank": rank}}


def write_kineto(path: Path, process: Process, rank: int | None = None) -> Path:
    """Write a trace of torch.profiler of one process."""
    path.write_text(json.dumps(kineto_document(process, rank)))
    return path


def ns(microseconds: float) -> int:
    return round(1000 * microseconds)
