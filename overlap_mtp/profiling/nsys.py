"""Read an SQLite export of Nsight Systems (`nsys export --type sqlite`).

Tables exist only if they have rows, and columns differ between versions: both are looked up first. The Nsight
Systems user guide describes the schema under "SQLite Schema Reference".
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.profiling.intervals import FOREVER, Ints
from overlap_mtp.profiling.trace import LOST, UNKNOWN, Activities, Kind, Profile, ProfileError, Ranges, Texts
from overlap_mtp.tracing import DOMAIN, LABEL

KNOWN_SCHEMAS = ("2", "3")  # major versions of EXPORT_SCHEMA_VERSION
TABLES = {
    Kind.KERNEL: "CUPTI_ACTIVITY_KIND_KERNEL",
    Kind.MEMSET: "CUPTI_ACTIVITY_KIND_MEMSET",
    Kind.HOST_COPY: "CUPTI_ACTIVITY_KIND_MEMCPY",
    Kind.GRAPH: "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
}
CALLS, RANGES, NODES = "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS", "CUDA_GRAPH_NODE_EVENTS"
PUSH_POP, START_END, DOMAIN_CREATED = 59, 60, 75  # NVTX_EVENTS.eventType
WITHIN_DEVICE, BETWEEN_DEVICES = (5, 6, 7, 8), 10  # copyKind, as CUpti_ActivityMemcpyKind
# The columns that a table must have (`..._MORE`: may have).
ACTIVITY = ("start", "end", "deviceId", "streamId", "correlationId")
ACTIVITY_MORE = ("globalPid", "graphNodeId", "bytes", "copyKind", "srcDeviceId", "dstDeviceId")
KERNEL_NAMES = ("shortName", "demangledName")  # the first one that exists is used
CALL = ("start", "globalTid", "correlationId")
PAYLOADS = ("uint64Value", "int64Value", "uint32Value", "int32Value")
RANGE, RANGE_MORE = ("start", "globalTid"), ("end", "eventType", "domainId", "textId", "text", *PAYLOADS)
NODE, NODE_MORE = ("start", "globalTid", "graphNodeId"), ("originalGraphNodeId",)
PID_BITS = 24  # a globalTid holds machine, process and thread; the thread has the lower bits


def read_nsys(path: Path) -> Profile:
    """Read an export.

    Raises:
        ProfileError: the file is no export, or it is damaged, empty or of an unknown schema.
    """
    uri = path.resolve().as_uri() + "?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return _Export(connection, path.name).profile()
    except ProfileError:
        raise
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        raise ProfileError(f"{path.name}: the SQLite file is damaged or not complete ({error})") from error


class _Export:
    """An open export."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._db, self._name = connection, name
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self._columns = {
            table: {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
            for (table,) in tables.fetchall()
        }

    def profile(self) -> Profile:
        self._check()
        names, strings = Texts(), dict(self._rows("StringIds", ("id", "value")))
        raw = [self._activities(kind, names, strings) for kind in TABLES if TABLES[kind] in self._columns]
        start, end, device, stream, correlation, global_pid, node, kind, name, num_bytes = np.concatenate(
            raw
        ).T
        launched, thread = _find_calls(global_pid >> PID_BITS, correlation, self._numbers(CALLS, CALL).T)
        process = np.where(global_pid != UNKNOWN, global_pid, thread) >> PID_BITS
        texts, ranges = self._ranges(strings)
        pids = np.unique(np.concatenate([process, ranges.process]))
        return Profile(
            self._name,
            [0 if pid == UNKNOWN else pid & 0xFFFFFF for pid in pids.tolist()],
            list(names),
            list(texts),
            Activities(
                *(start, np.maximum(start, end), np.searchsorted(pids, process), device, stream),
                *(kind, name, num_bytes, launched, thread, *self._captures(process, node)),
            ),
            replace(ranges, process=np.searchsorted(pids, ranges.process)),
        )

    def _check(self) -> None:
        if not any(table.startswith(("CUPTI_", "META_DATA_", "NVTX_")) for table in self._columns):
            raise ProfileError(f"{self._name}: an SQLite file, but not an export of Nsight Systems")
        metadata = dict(self._rows("META_DATA_EXPORT", ("name", "value")))
        version = str(metadata.get("EXPORT_SCHEMA_VERSION", KNOWN_SCHEMAS[-1]))
        if version.split(".")[0] not in KNOWN_SCHEMAS:
            raise ProfileError(
                f"{self._name}: schema version {version} is not known; known are {', '.join(KNOWN_SCHEMAS)}.x"
            )
        if not set(TABLES.values()) & set(self._columns):
            raise ProfileError(
                f"{self._name}: the profile holds no kernel, copy or memset: was the GPU traced (-t cuda,nvtx)?"
            )

    def _activities(self, kind: Kind, names: Texts, strings: Mapping[int, str]) -> Ints:
        """[n, 10]: start, end, device, stream, correlation, globalPid, graph node, kind, name, bytes."""
        table = TABLES[kind]
        label = next((name for name in KERNEL_NAMES if name in self._columns[table]), KERNEL_NAMES[0])
        rows = self._numbers(table, ACTIVITY, (*ACTIVITY_MORE, label))
        num_bytes, copy_kind, source, target, label_id = rows[:, 7:].T
        kinds = np.full(len(rows), kind, np.int64)
        if kind is Kind.HOST_COPY:
            between = (source != target) & (source >= 0) & (target >= 0)
            within = np.isin(copy_kind, WITHIN_DEVICE)
            kinds[within] = Kind.LOCAL_COPY
            kinds[(within & between) | (copy_kind == BETWEEN_DEVICES)] = Kind.PEER_COPY
        if kind is Kind.KERNEL:
            texts = [strings.get(i, "unknown kernel") for i in label_id.tolist()]
        else:
            texts = [Kind(i).name.lower().replace("_", " ") for i in kinds.tolist()]
        name = np.array([names[text] for text in texts], np.int64)
        return np.column_stack([rows[:, :7], kinds, name, num_bytes])

    def _captures(self, process: Ints, node: Ints) -> Ints:
        """[2, n]: when and on which thread each node of a graph was captured, or LOST; else UNKNOWN."""
        copied_from: dict[tuple[int, int], int] = {}
        made: dict[tuple[int, int], tuple[int, int]] = {}
        for start, tid, its_node, original in self._numbers(NODES, NODE, NODE_MORE).tolist():
            made.setdefault((tid >> PID_BITS, its_node), (start, tid))
            if original not in (UNKNOWN, 0, its_node):
                copied_from[tid >> PID_BITS, its_node] = original

        @cache
        def capture(process: int, node: int) -> tuple[int, int]:
            seen = set()
            while (process, node) in copied_from and node not in seen:
                seen.add(node)
                node = copied_from[process, node]
            return made.get((process, node), (LOST, LOST)) if node > 0 else (UNKNOWN, UNKNOWN)

        pairs = zip(process.tolist(), node.tolist(), strict=True)
        return np.array([capture(*pair) for pair in pairs], np.int64).reshape(-1, 2).T

    def _ranges(self, strings: Mapping[int, str]) -> tuple[Texts, Ranges]:
        """The texts and the ranges; here `process` is the upper bits of the globalTid, not an index."""
        texts = Texts()
        domains: dict[tuple[int, int], str] = {}
        columns = []
        for start, tid, end, event, domain, text_id, text, *values in self._rows(RANGES, RANGE, RANGE_MORE):
            name = text if text is not None else strings.get(text_id)
            if name is None or start is None:
                continue
            tid = UNKNOWN if tid is None else tid
            if event == DOMAIN_CREATED:
                domains[tid >> PID_BITS, domain or 0] = name
            elif event in (PUSH_POP, START_END) or (event is None and end is not None):
                payload = next((value for value in values if value), 0)
                stop = FOREVER if end is None else end
                columns.append((start, stop, tid >> PID_BITS, tid, texts[name], payload, domain or 0))
        start, stop, process, thread, index, payload, domain = np.array(columns, np.int64).reshape(-1, 7).T
        is_label = np.array([LABEL.match(one) is not None for one in texts], bool)
        # A domain that was made before the capture began has no name here: then the label alone decides.
        named = [domains.get(key, DOMAIN) for key in zip(process.tolist(), domain.tolist(), strict=True)]
        is_ours = is_label[index] & (np.array(named, object) == DOMAIN)
        return texts, Ranges(start, stop, process, thread, index, payload, is_ours)

    def _numbers(self, table: str, required: Sequence[str], optional: Sequence[str] = ()) -> Ints:
        """[n, columns]: as `_rows`, with UNKNOWN for what is missing."""
        rows = self._rows(table, required, optional, str(UNKNOWN))
        return np.fromiter(rows, np.dtype((np.int64, len(required) + len(optional))))

    def _rows(
        self, table: str, required: Sequence[str], optional: Sequence[str] = (), missing: str = "NULL"
    ) -> Iterator[Any]:
        """The rows of a table, with `missing` for a value or a column that is missing; none for a missing table."""
        have = self._columns.get(table)
        if have is None:
            return iter(())
        if unknown := [column for column in required if column not in have]:
            raise ProfileError(f"{self._name}: unknown schema: {table} has no column {unknown[0]}")
        wanted = [
            f'COALESCE("{name}", {missing})' if name in have else missing for name in (*required, *optional)
        ]
        return self._db.execute(f'SELECT {", ".join(wanted)} FROM "{table}"')


def _find_calls(process: Ints, correlation: Ints, calls: Ints) -> tuple[Ints, Ints]:
    """When and on which thread each activity was launched, or UNKNOWN if no call has its correlation.

    `process` is UNKNOWN for an activity that does not tell it: then correlations alone decide. `calls` is [3, n]:
    start, thread, correlation. Of several calls with one correlation the first counts.
    """
    start, thread, called = calls
    processes = np.concatenate([thread >> PID_BITS, process])
    if (process == UNKNOWN).any():
        processes[:] = 0
    number = np.unique(processes, return_inverse=True)[1]
    key = np.unique(number << 40 | np.concatenate([called, correlation]), return_inverse=True)[1]
    first = np.full(key.size, UNKNOWN)  # the first call with each key
    order = np.argsort(start)[::-1]
    first[key[order]] = order  # of several, the last one assigned stays
    call = np.where(correlation >= 0, first[key[start.size :]], UNKNOWN)
    return np.append(start, UNKNOWN)[call], np.append(thread, UNKNOWN)[call]
