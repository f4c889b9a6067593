"""Read an SQLite export of Nsight Systems (`nsys export --type sqlite`).

Tables exist only if they have rows, and columns differ between versions: both are looked up first. The Nsight
Systems user guide describes the schema under "SQLite Schema Reference".
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from overlap_mtp.labels import DOMAIN
from overlap_mtp.profiling.intervals import FOREVER, Ints
from overlap_mtp.profiling.trace import (
    LOST,
    UNKNOWN,
    UNNAMED,
    Activities,
    Kind,
    Profile,
    ProfileError,
    Ranges,
    Texts,
    label_of,
    printable,
)

KNOWN_SCHEMAS = ("2", "3")  # major versions of EXPORT_SCHEMA_VERSION
TABLES = {
    Kind.KERNEL: "CUPTI_ACTIVITY_KIND_KERNEL",
    Kind.MEMSET: "CUPTI_ACTIVITY_KIND_MEMSET",
    Kind.HOST_COPY: "CUPTI_ACTIVITY_KIND_MEMCPY",
    Kind.GRAPH: "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
}
CALLS, RANGES, NODES = "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS", "CUDA_GRAPH_NODE_EVENTS"
DIAGNOSTICS = "DIAGNOSTIC_EVENT"  # what Nsight Systems says of its own recording
MISSING = re.compile(
    r"not all .* (collected|captured)|events? (were|was|have been) (dropped|lost)", re.IGNORECASE
)
MOST_SAID, LONGEST_SAID = 5, 300  # texts that say so, and characters of each that are read
PUSH_POP, START_END, DOMAIN_CREATED = 59, 60, 75  # NVTX_EVENTS.eventType
WITHIN_DEVICE, BETWEEN_DEVICES = (5, 6, 7, 8), 10  # copyKind, as CUpti_ActivityMemcpyKind
# The columns that a table must have (`..._MORE`: may have).
ACTIVITY = ("start", "end", "deviceId", "streamId", "correlationId")
ACTIVITY_MORE = ("globalPid", "graphNodeId", "bytes", "copyKind", "srcDeviceId", "dstDeviceId")
KERNEL_NAMES = ("demangledName", "shortName", "mangledName")  # the first one that names the kernel is used
CALL = ("start", "globalTid", "correlationId")
PAYLOADS = ("uint64Value", "int64Value", "uint32Value", "int32Value")
RANGE, RANGE_MORE = ("start", "globalTid"), ("end", "eventType", "domainId", "textId", *PAYLOADS)
NODE, NODE_MORE = ("start", "globalTid", "graphNodeId"), ("originalGraphNodeId",)
LEAST_ROW_BYTES = 8  # a file cannot hold more rows than its size allows, unless it is crafted
MOST_BYTES = 1 << 48  # more in one copy is not believed
PID_BITS = 24  # a globalTid holds machine, process and thread; the thread has the lower bits


def read_nsys(name: str, path: Path) -> Profile:
    """Read an export.

    Args:
        name: names the export in messages and in the profile.
        path: the file.

    Raises:
        ProfileError: the file is no export, or it is damaged, empty or of an unknown schema.
    """
    try:
        with closing(connect(path)) as connection:
            return _Export(connection, name, path.stat().st_size).profile()
    except ProfileError:
        raise
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        raise ProfileError(f"{name}: the SQLite file is damaged or not complete ({error})") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open an SQLite file for reading."""
    connection = sqlite3.connect(path.resolve().as_uri() + "?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    return connection


def tables_of(db: sqlite3.Connection, schema: str = "main") -> list[str]:
    """Return the names of the tables. Views and virtual tables, which can make up endless rows, are left out."""
    rows = db.execute(f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' AND rootpage > 0")
    return [str(name) for (name,) in rows.fetchall()]


def says_missing(text: object) -> bool:
    """Return whether a text of DIAGNOSTICS says that events are missing."""
    return MISSING.search(printable(text)[:LONGEST_SAID]) is not None


class _Export:
    """An open export."""

    def __init__(self, connection: sqlite3.Connection, name: str, size: int) -> None:
        self._db, self._name, self._most_rows = connection, name, size // LEAST_ROW_BYTES
        wanted = {*TABLES.values(), CALLS, RANGES, NODES, DIAGNOSTICS, "StringIds", "META_DATA_EXPORT"}
        tables = tables_of(connection)
        self._is_export = any(table.startswith(("CUPTI_", "META_DATA_", "NVTX_")) for table in tables)
        self._columns = {
            table: {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
            for table in wanted.intersection(tables)
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
        captured, capture_thread = self._captures(process, node)
        pids = np.unique(np.concatenate([process, ranges.process]))
        return Profile(
            self._name,
            [0 if pid == UNKNOWN else pid & 0xFFFFFF for pid in pids.tolist()],
            list(names),
            list(texts),
            Activities(
                start=start,
                end=np.maximum(start, end),
                process=np.searchsorted(pids, process),
                device=device,
                stream=stream,
                kind=kind,
                name=name,
                num_bytes=num_bytes,
                launched=launched,
                thread=thread,
                captured=captured,
                capture_thread=capture_thread,
                group=np.full_like(start, UNKNOWN),
            ),
            replace(ranges, process=np.searchsorted(pids, ranges.process)),
            notes=list(self._notes(start, end)),
        )

    def _notes(self, start: Ints, end: Ints) -> Iterator[str]:
        if (start == UNKNOWN).any():
            raise ProfileError(f"{self._name}: {(start == UNKNOWN).sum():,} activities have no start")
        if backwards := int((end < start).sum()):
            yield (
                f"{self._name}: {backwards:,} activities end before they begin, or have no end, and count as no time."
            )
        said = {printable(text) for (text,) in self._rows(DIAGNOSTICS, (), ("text",)) if says_missing(text)}
        for text in sorted(said)[:MOST_SAID]:
            yield f"{self._name}: Nsight Systems says that events are missing: {text[:LONGEST_SAID]}"

    def _check(self) -> None:
        if not self._is_export:
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
        rows = self._numbers(TABLES[kind], ACTIVITY, (*ACTIVITY_MORE, *KERNEL_NAMES))
        num_bytes, copy_kind, source, target, *label_ids = rows[:, 7:].T
        kinds = np.full(len(rows), kind, np.int64)
        if kind is Kind.HOST_COPY:
            between = (source != target) & (source >= 0) & (target >= 0)
            within = np.isin(copy_kind, WITHIN_DEVICE)
            kinds[within] = Kind.LOCAL_COPY
            kinds[(within & between) | (copy_kind == BETWEEN_DEVICES)] = Kind.PEER_COPY
        if kind is Kind.KERNEL:
            texts = self._kernel_names(label_ids, strings)
        else:
            texts = [Kind(i).name.lower().replace("_", " ") for i in kinds.tolist()]
        name = np.array([names[text] for text in texts], np.int64)
        believed = np.where((num_bytes >= 0) & (num_bytes < MOST_BYTES), num_bytes, UNKNOWN)
        return np.column_stack([rows[:, :7], kinds, name, believed])

    def _kernel_names(self, label_ids: Sequence[Ints], strings: Mapping[int, str]) -> list[str]:
        """The first of its names that is known for each kernel, else UNNAMED."""
        triples = list(zip(*(ids.tolist() for ids in label_ids), strict=True))
        found = {
            ids: next((text for i in ids if (text := printable(strings.get(i)))), UNNAMED)
            for ids in set(triples)
        }
        return [found[ids] for ids in triples]

    def _captures(self, process: Ints, node: Ints) -> Ints:
        """[2, n]: when and on which thread each node of a graph was captured, or LOST; else UNKNOWN."""
        copied_from: dict[tuple[int, int], tuple[int, int]] = {}
        made: dict[tuple[int, int], tuple[int, int]] = {}
        for start, tid, its_node, source in self._numbers(NODES, NODE, NODE_MORE).tolist():
            made.setdefault((tid >> PID_BITS, its_node), (start, tid))
            if source not in (UNKNOWN, 0, its_node):
                copied_from[tid >> PID_BITS, its_node] = (tid >> PID_BITS, source)
        originals: dict[tuple[int, int], tuple[int, int]] = {}

        def original(pair: tuple[int, int]) -> tuple[int, int]:
            """The node that was captured; each step of a chain of copies is gone once."""
            path = dict.fromkeys([pair])
            while pair not in originals and pair in copied_from and copied_from[pair] not in path:
                pair = copied_from[pair]
                path[pair] = None
            pair = originals.get(pair, pair)
            originals.update(dict.fromkeys(path, pair))
            return pair

        pairs = zip(process.tolist(), node.tolist(), strict=True)
        found = [
            made.get(original(pair), (LOST, LOST)) if pair[1] > 0 else (UNKNOWN, UNKNOWN) for pair in pairs
        ]
        return np.array(found, np.int64).reshape(-1, 2).T

    def _ranges(self, strings: Mapping[int, str]) -> tuple[Texts, Ranges]:
        """The texts and the ranges; here `process` is the upper bits of the globalTid, not an index."""
        columns = self._numbers(RANGES, RANGE, RANGE_MORE)
        texts, index = self._range_texts(columns[:, 5], strings)
        start, thread, end, event, domain, _, *payloads = columns.T
        domain = np.maximum(domain, 0)
        named = (index != UNKNOWN) & (start != UNKNOWN)
        process = thread >> PID_BITS
        made = np.flatnonzero(named & (event == DOMAIN_CREATED))
        words = list(texts)
        domains = {(int(process[at]), int(domain[at])): words[index[at]] for at in made.tolist()}
        is_range = np.isin(event, (PUSH_POP, START_END)) | ((event == UNKNOWN) & (end != UNKNOWN))
        kept = np.flatnonzero(named & is_range)
        start, process, thread, index, domain = (
            column[kept] for column in (start, process, thread, index, domain)
        )
        stop = np.where(end[kept] == UNKNOWN, FOREVER, np.maximum(start, end[kept]))
        payload = np.zeros_like(start)
        for column in reversed(payloads):
            payload = np.where(np.isin(column[kept], (0, UNKNOWN)), payload, column[kept])
        is_label = np.array([label_of(one) is not None for one in texts], bool)
        # A domain that was made before the capture began has no name here: then the label alone decides.
        is_ours = is_label[index]
        for at in np.flatnonzero(is_ours).tolist():
            is_ours[at] = domains.get((int(process[at]), int(domain[at])), DOMAIN) == DOMAIN
        return texts, Ranges(start, stop, process, thread, index, payload, is_ours)

    def _range_texts(self, text_id: Ints, strings: Mapping[int, str]) -> tuple[Texts, Ints]:
        """The texts of ranges, and the index of each row's text: its own, or the one that its id stands for."""
        texts = Texts()
        ids, number = np.unique(text_id, return_inverse=True)
        known = [
            texts[printable(strings[i])] if strings.get(i) is not None else UNKNOWN for i in ids.tolist()
        ]
        index = np.array(known, np.int64)[number]
        if "text" in self._columns.get(RANGES, ()):
            for at, (text,) in enumerate(self._rows(RANGES, ("text",))):
                if text is not None:
                    index[at] = texts[printable(text)]
        return texts, index

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
        return self._bounded(self._db.execute(f'SELECT {", ".join(wanted)} FROM "{table}"'))

    def _bounded(self, rows: sqlite3.Cursor) -> Iterator[Any]:
        """The rows, but not more than the file has room for: pages of a crafted file can lead to one another."""
        yield from islice(rows, self._most_rows)
        if rows.fetchone() is not None:
            raise ProfileError(
                f"{self._name}: the SQLite file is damaged: it yields more rows than it has room for"
            )


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
    correlations = np.unique(np.concatenate([called, correlation]), return_inverse=True)[1]
    key = np.unique(number * correlations.size + correlations, return_inverse=True)[1]
    first = np.full(key.size, UNKNOWN)  # the first call with each key
    order = np.argsort(start)[::-1]
    first[key[order]] = order  # of several, the last one assigned stays
    call = np.where(correlation >= 0, first[key[start.size :]], UNKNOWN)
    return np.append(start, UNKNOWN)[call], np.append(thread, UNKNOWN)[call]
