"""Write profiles with known answers, in both formats. All times are in µs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
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
    extra_calls: Sequence[float] = ()  # times of calls that launch nothing

    def launches(self) -> list[tuple[Work, int, bool]]:
        """Each work, its correlation, and whether it is the first with that correlation."""
        numbers = [work.correlation or 100 + number for number, work in enumerate(self.work)]
        return [
            (work, n, n not in numbers[:at])
            for at, (work, n) in enumerate(zip(self.work, numbers, strict=True))
        ]


class NsysWriter:
    """Collects rows by table: a table that gets no row is not made, as in real exports."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {"StringIds": []}

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)

    def string(self, text: str) -> int:
        strings = [row["value"] for row in self.rows["StringIds"]]
        if text in strings:
            return strings.index(text)
        self.add("StringIds", id=len(strings), value=text)
        return len(strings)

    def process(self, process: Process) -> None:
        pid = MACHINE | process.pid << 24
        domains = list(dict.fromkeys([None, *(span.domain for span in process.spans)]))
        for number, domain in enumerate(domains[1:], 1):
            row = {"eventType": 75, "text": domain, "domainId": number}
            self.add("NVTX_EVENTS", start=0, globalTid=pid | 1, **row)
        for span in process.spans:
            row = {
                "start": ns(span.start),
                "end": None if span.end is None else ns(span.end),
                "eventType": 59,
            }
            row |= {"textId": self.string(span.text), "uint64Value": span.payload or None}
            self.add("NVTX_EVENTS", globalTid=pid | span.thread, domainId=domains.index(span.domain), **row)
        for node, original, time in process.nodes:
            row = {"graphNodeId": node, "originalGraphNodeId": original, "nameId": self.string("node")}
            self.add("CUDA_GRAPH_NODE_EVENTS", start=ns(time), end=ns(time), globalTid=pid | 1, **row)
        calls = [(time, 1, 1) for time in process.extra_calls]
        for work, correlation, is_first in process.launches():
            calls += [(work.launched, work.thread, correlation)] * is_first
            self._work(work, deviceId=process.device, correlationId=correlation, globalPid=pid)
        for time, thread, correlation in calls:
            row = {"start": ns(time), "end": ns(time) + 500, "nameId": self.string("cudaLaunchKernel_v7000")}
            self.add("CUPTI_ACTIVITY_KIND_RUNTIME", globalTid=pid | thread, correlationId=correlation, **row)

    def _work(self, work: Work, **row: Any) -> None:
        row |= {"start": ns(work.start), "end": ns(work.end), "streamId": work.stream, "contextId": 1}
        if work.name == "CUDA graph":
            self.add("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", **row, graphId=1, graphExecId=2)
            return
        row["graphNodeId"] = work.graph_node
        if work.name.startswith("Memcpy"):
            kind = COPY_KINDS[work.name.split()[1]]
            self.add("CUPTI_ACTIVITY_KIND_MEMCPY", **row, bytes=work.num_bytes, copyKind=kind)
        elif work.name.startswith("Memset"):
            self.add("CUPTI_ACTIVITY_KIND_MEMSET", **row, bytes=work.num_bytes)
        else:
            row |= {
                "shortName": self.string(work.name),
                "demangledName": self.string(f"void {work.name}(int)"),
            }
            self.add("CUPTI_ACTIVITY_KIND_KERNEL", **row)

    def write(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            for table, rows in self.rows.items():
                columns = dict.fromkeys(column for row in rows for column in row)
                db.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
                values = [[row.get(column) for column in columns] for row in rows]
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", values)
            db.commit()


def write_nsys(path: Path, processes: Sequence[Process], version: str = "3.20.2") -> Path:
    """Write an SQLite export of Nsight Systems, with an environment such as a real one has."""
    writer = NsysWriter()
    for process in processes:
        writer.process(process)
    writer.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value=version)
    writer.add(
        "META_DATA_EXPORT", name="EXPORT_COMMAND", value="/home/someone/nsys export secret-host.nsys-rep"
    )
    writer.add("TARGET_INFO_SYSTEM_ENV", name="Hostname", value="secret-host")
    writer.add(
        "ProcessStreams", filenameId=writer.string("/home/someone/log"), contentId=writer.string("TOKEN=x")
    )
    writer.write(path)
    return path


def kineto_document(process: Process, rank: int | None = None) -> dict[str, Any]:
    """Return a trace of torch.profiler of one process."""
    machine = {"ph": "M", "ts": 0, "pid": process.pid, "tid": 0, "args": {"name": "/home/x/python"}}
    events: list[dict[str, Any]] = [{"name": "process_name", **machine}]

    def add(cat: str, name: str, pid: int, tid: int, start: float, end: float, **args: Any) -> None:
        times = {"ts": start, "dur": end - start}
        events.append({"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, **times, "args": args})

    for span in process.spans:
        end = span.start + 1e6 if span.end is None else span.end
        add("user_annotation", span.text, process.pid, span.thread, span.start, end, index=1)
    for work, correlation, is_first in process.launches():
        at = work.launched
        if is_first:
            add(
                "cuda_runtime",
                "cudaLaunchKernel",
                process.pid,
                work.thread,
                at,
                at + 0.5,
                correlation=correlation,
            )
        args: dict[str, Any] = {"device": process.device, "stream": work.stream, "correlation": correlation}
        category = "kernel"
        if work.name.startswith(("Memcpy", "Memset")):
            category = "gpu_memcpy" if work.name.startswith("Memcpy") else "gpu_memset"
            args["bytes"] = work.num_bytes
        elif work.num_bytes:
            args |= {"In msg nelems": work.num_bytes // 8, "dtype": "Long", "Collective name": "send"}
        add(category, work.name, process.device, work.stream, work.start, work.end, **args)
    document = {"schemaVersion": 1, "traceName": "/home/someone/rank0.json", "traceEvents": events}
    return document if rank is None else {**document, "distributedInfo": {"backend": "nccl", "rank": rank}}


def write_kineto(path: Path, process: Process, rank: int | None = None) -> Path:
    """Write a trace of torch.profiler of one process."""
    path.write_text(json.dumps(kineto_document(process, rank)))
    return path


def ns(microseconds: float) -> int:
    return round(1000 * microseconds)
