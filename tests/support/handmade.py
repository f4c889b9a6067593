"""Profiles made by hand, with known answers, in both formats. All times in µs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MACHINE = 0x11 << 56
COPY_KINDS = {"HtoD": 1, "DtoH": 2, "DtoD": 8, "PtoP": 10}


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
    extra_calls: Sequence[tuple[float, int]] = field(
        default=()
    )  # (time, thread) of calls that launch nothing


TABLES = {
    "StringIds": "id INTEGER PRIMARY KEY, value TEXT NOT NULL",
    "META_DATA_EXPORT": "name TEXT NOT NULL, value TEXT",
    "TARGET_INFO_SYSTEM_ENV": "globalVid INT, devStateName TEXT, name TEXT, nameEnum INT, value TEXT",
    "ProcessStreams": "globalPid INT, filenameId INT, contentId INT",
    "NVTX_EVENTS": "start INT NOT NULL, end INT, eventType INT NOT NULL, text TEXT, globalTid INT, textId INT, "
    "domainId INT, uint64Value INT, int64Value INT, jsonText TEXT",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start INT NOT NULL, end INT NOT NULL, eventClass INT NOT NULL, globalTid INT, "
    "correlationId INT, nameId INT NOT NULL, returnValue INT NOT NULL, callchainId INT",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, contextId INT, "
    "streamId INT NOT NULL, correlationId INT, globalPid INT, demangledName INT NOT NULL, shortName INT NOT NULL, "
    "graphNodeId INT, gridX INT",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, contextId INT, "
    "streamId INT NOT NULL, correlationId INT, globalPid INT, bytes INT NOT NULL, copyKind INT NOT NULL, "
    "srcDeviceId INT, dstDeviceId INT, graphNodeId INT",
    "CUPTI_ACTIVITY_KIND_MEMSET": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, contextId INT, "
    "streamId INT NOT NULL, correlationId INT, globalPid INT, value INT, bytes INT NOT NULL, graphNodeId INT",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, "
    "contextId INT, streamId INT NOT NULL, correlationId INT, globalPid INT, graphId INT, graphExecId INT",
    "CUDA_GRAPH_NODE_EVENTS": "start INT NOT NULL, end INT NOT NULL, eventClass INT, globalTid INT, nameId INT, "
    "graphNodeId INT NOT NULL, originalGraphNodeId INT",
}


class NsysWriter:
    """Collects rows by table: a table that gets no row is not made, as in real exports."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._strings: dict[str, int] = {}

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)

    def string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings) + 1)

    def process(self, process: Process) -> None:
        global_pid = MACHINE | process.pid << 24
        domains = {None: 0}
        for span in process.spans:
            if span.domain not in domains:
                domains[span.domain] = len(domains)
                created = {
                    "start": 0,
                    "eventType": 75,
                    "text": span.domain,
                    "globalTid": global_pid | span.thread,
                }
                self.add("NVTX_EVENTS", **created, domainId=domains[span.domain])
            self.add(
                "NVTX_EVENTS",
                start=ns(span.start),
                end=None if span.end is None else ns(span.end),
                eventType=59,
                textId=self.string(span.text),
                globalTid=global_pid | span.thread,
                domainId=domains[span.domain],
                uint64Value=span.payload or None,
            )
        for time, thread in process.extra_calls:
            self.call(time, global_pid | thread, 1)
        for node, original, time in process.nodes:
            row = {
                "start": ns(time),
                "end": ns(time),
                "globalTid": global_pid | 1,
                "nameId": self.string("node"),
            }
            self.add("CUDA_GRAPH_NODE_EVENTS", **row, graphNodeId=node, originalGraphNodeId=original)
        called = set()
        for number, work in enumerate(process.work):
            correlation = work.correlation or 100 + number
            if correlation not in called:
                called.add(correlation)
                self.call(work.launched, global_pid | work.thread, correlation)
            self.work(work, process.device, correlation, global_pid)

    def call(self, time: float, thread: int, correlation: int) -> None:
        row = {
            "start": ns(time),
            "end": ns(time) + 500,
            "eventClass": 0,
            "globalTid": thread,
            "returnValue": 0,
        }
        name = self.string("cudaLaunchKernel_v7000")
        self.add("CUPTI_ACTIVITY_KIND_RUNTIME", **row, correlationId=correlation, nameId=name)

    def work(self, work: Work, device: int, correlation: int, global_pid: int) -> None:
        row = {"start": ns(work.start), "end": ns(work.end), "deviceId": device, "streamId": work.stream}
        row |= {"correlationId": correlation, "globalPid": global_pid, "graphNodeId": work.graph_node}
        if work.name == "CUDA graph":
            row.pop("graphNodeId")
            self.add("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", **row, graphId=1, graphExecId=2)
        elif work.name.startswith("Memcpy"):
            kind = COPY_KINDS[work.name.split()[1]]
            self.add("CUPTI_ACTIVITY_KIND_MEMCPY", **row, bytes=work.num_bytes, copyKind=kind)
        elif work.name.startswith("Memset"):
            self.add("CUPTI_ACTIVITY_KIND_MEMSET", **row, bytes=work.num_bytes)
        else:
            names = {
                "shortName": self.string(work.name),
                "demangledName": self.string(f"void {work.name}(int)"),
            }
            self.add("CUPTI_ACTIVITY_KIND_KERNEL", **row, **names)

    def write(self, path: Path) -> None:
        strings = [{"id": i, "value": text} for text, i in self._strings.items()]
        rows = {**self.rows, "StringIds": strings} if strings else self.rows
        with closing(sqlite3.connect(path)) as db:
            for table, members in rows.items():
                db.execute(f"CREATE TABLE {table} ({TABLES[table]})")
                columns = list(dict.fromkeys(column for row in members for column in row))
                marks = ", ".join("?" for _ in columns)
                names = ", ".join(f'"{column}"' for column in columns)
                values = [[row.get(column) for column in columns] for row in members]
                db.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", values)
            db.commit()


def write_nsys(path: Path, processes: Sequence[Process], version: str = "3.20.2") -> Path:
    """An SQLite export of Nsight Systems, with an environment such as a real one has."""
    writer = NsysWriter()
    for process in processes:
        writer.process(process)
    writer.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value=version)
    writer.add(
        "META_DATA_EXPORT", name="EXPORT_COMMAND", value="/home/someone/nsys export secret-host.nsys-rep"
    )
    writer.add("TARGET_INFO_SYSTEM_ENV", globalVid=1, name="Hostname", value="secret-host")
    writer.add(
        "ProcessStreams",
        globalPid=1,
        filenameId=writer.string("/home/someone/log"),
        contentId=writer.string("TOKEN=x"),
    )
    writer.write(path)
    return path


def kineto_document(process: Process, rank: int | None = None) -> dict[str, Any]:
    """A trace of torch.profiler of one process."""
    events: list[dict[str, Any]] = [
        {
            "name": "process_name",
            "ph": "M",
            "ts": 0,
            "pid": process.pid,
            "tid": 0,
            "args": {"name": "/home/x/python"},
        }
    ]
    for span in process.spans:
        end = span.start + 1e6 if span.end is None else span.end
        event = {"cat": "user_annotation", "name": span.text, "pid": process.pid, "tid": span.thread}
        events.append({"ph": "X", **event, "ts": span.start, "dur": end - span.start, "args": {"Ev Idx": 1}})
    called = set()
    for number, work in enumerate(process.work):
        correlation = work.correlation or 100 + number
        if correlation not in called:
            called.add(correlation)
            call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": process.pid}
            where = {
                "tid": work.thread,
                "ts": work.launched,
                "dur": 0.5,
                "args": {"correlation": correlation},
            }
            events.append({**call, **where})
        args: dict[str, Any] = {"device": process.device, "stream": work.stream, "correlation": correlation}
        category = "kernel"
        if work.name.startswith(("Memcpy", "Memset")):
            category = "gpu_memcpy" if work.name.startswith("Memcpy") else "gpu_memset"
            args["bytes"] = work.num_bytes
        elif work.num_bytes:
            args |= {"In msg nelems": work.num_bytes // 8, "dtype": "Long", "Collective name": "send"}
        times = {"ts": work.start, "dur": work.end - work.start}
        where = {"pid": process.device, "tid": work.stream}
        events.append({"ph": "X", "cat": category, "name": work.name, **where, **times, "args": args})
    document: dict[str, Any] = {
        "schemaVersion": 1,
        "traceName": "/home/someone/rank0.json",
        "traceEvents": events,
    }
    if rank is not None:
        document["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": 2}
    return document


def write_kineto(path: Path, process: Process, rank: int | None = None) -> Path:
    path.write_text(json.dumps(kineto_document(process, rank)))
    return path


def ns(microseconds: float) -> int:
    return round(1000 * microseconds)
