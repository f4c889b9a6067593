"""Make a profile small and anonymous: keep what is read and nothing else.

    python -m overlap_mtp.profiling.shrink out/modes.sqlite profiles/modes.sqlite.gz

An export of Nsight Systems holds the environment, host name, command line and paths of the machine. Of the ranges
only those of this project are kept, or all of them if there are none of this project. Of its diagnostics only those
are kept which say that events are missing. Folders are cut from all texts.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from overlap_mtp.labels import DOMAIN
from overlap_mtp.profiling import kineto, nsys
from overlap_mtp.profiling.json_stream import read_items
from overlap_mtp.profiling.read import is_nsys, opened_text, read_profile, unpacked
from overlap_mtp.profiling.trace import ProfileError, label_of, printable

# A match begins where a path begins, and is not tried again inside of one: that would take quadratic time.
FOLDERS = re.compile(r"(?<![\w.~/-])(?:[\w.~-]*/)+(?=[\w.-])")
WORK_ARGS = (
    *("device", "stream", "correlation", "bytes", "In msg nelems", "dtype"),
    *("fromDevice", "toDevice", "graph node id"),
    *("Collective name", "Process Group Name", "Process Group Ranks"),
)
NAME = nsys.KERNEL_NAMES[0]
EXACT_NS = 10**15  # readers of JSON use floats, which hold any 15 digits


def shrink(source: Path, target: Path) -> None:
    """Write the part of a profile that the report reads, gzipped.

    Args:
        source: a profile, gzipped or not.
        target: the file to write, in a folder that need not exist. The same profile always gives the same bytes.

    Raises:
        ProfileError: `source` is no profile, or it is `target` itself; nothing is written.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ProfileError(f"{source.name}: the target is the profile itself: name another file")
    read_profile(source)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        if is_nsys(source):
            with unpacked(source) as plain:
                try:
                    _shrink_nsys(plain, small)
                except sqlite3.Error as error:
                    raise ProfileError(f"{source.name}: the SQLite file is damaged ({error})") from error
        else:
            _shrink_kineto(source, small)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
            stream.write(small.read_bytes())


def without_folders(text: str | None) -> str | None:
    """Return `run.py` for `/home/me/run.py`, in any text."""
    return None if text is None else FOLDERS.sub("", printable(text))


def is_label(text: object) -> bool:
    """Return whether a text is a label of this project."""
    return label_of(printable(text)) is not None


def _shrink_nsys(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(target)) as db:
        db.create_function("without_folders", 1, without_folders, deterministic=True)
        db.create_function("is_ours", 1, is_label, deterministic=True)
        db.create_function("says_missing", 1, nsys.says_missing, deterministic=True)
        db.text_factory = lambda text: text.decode("utf-8", "replace")
        db.execute("ATTACH ? AS source", (str(source),))
        tables = set(nsys.tables_of(db, "source"))
        have_texts = {"id", "value"} <= _columns(db, "StringIds") and "StringIds" in tables
        texts = "SELECT id, value FROM source.StringIds" if have_texts else "SELECT NULL AS id, NULL AS value"
        db.execute(f"CREATE TEMP TABLE texts AS {texts}")
        db.execute("CREATE INDEX temp.text_ids ON texts (id)")
        activities = sorted(tables & {*nsys.TABLES.values()})
        strings = []  # selects the ids of strings that are kept
        for table in activities:
            kept = (*nsys.ACTIVITY, *nsys.ACTIVITY_MORE)
            name = _kernel_name(_columns(db, table))
            _copy(db, table, kept, computed=name)
            strings += [f"SELECT {NAME} FROM main.{table}"] if name else []
        launched = " UNION ".join(f"SELECT correlationId FROM source.{table}" for table in activities)
        _copy(db, nsys.CALLS, nsys.CALL, f"correlationId IN ({launched})")
        _copy(db, nsys.NODES, (*nsys.NODE, *nsys.NODE_MORE))
        _copy(db, nsys.RANGES, (*nsys.RANGE, *nsys.RANGE_MORE, "text"), _kept_ranges(db, tables))
        if "textId" in _columns(db, nsys.RANGES):
            strings.append(f"SELECT textId FROM main.{nsys.RANGES}")
        _copy(db, "META_DATA_EXPORT", ("name", "value"), "name = 'EXPORT_SCHEMA_VERSION'")
        _copy(db, "StringIds", ("id", "value"), f"id IN ({' UNION '.join(strings) or 'NULL'})")
        _copy(db, nsys.DIAGNOSTICS, ("text",), "says_missing(text)")
        for table, column in (("StringIds", "value"), (nsys.RANGES, "text"), (nsys.DIAGNOSTICS, "text")):
            if column in _columns(db, table):
                db.execute(f"UPDATE main.{table} SET {column} = without_folders({column})")
        db.commit()
        db.execute("DETACH source")
        db.execute("VACUUM")


def _copy(
    db: sqlite3.Connection, table: str, columns: Sequence[str], condition: str = "1", computed: str = ""
) -> None:
    """Copy these columns of a table, as far as they exist, in the rows that meet the condition."""
    have = _columns(db, table)
    kept = [f'"{column}"' for column in columns if column in have]
    if kept:
        selected = ", ".join([*kept, computed] if computed else kept)
        db.execute(f"CREATE TABLE main.{table} AS SELECT {selected} FROM source.{table} WHERE {condition}")


def _kernel_name(have: Collection[str]) -> str:
    """The expression for the column NAME: of the names that a kernel has, the one that is read."""
    found = [
        f"(SELECT id FROM temp.texts WHERE id = {name} AND value <> '' LIMIT 1)"
        for name in nsys.KERNEL_NAMES
        if name in have
    ]
    return f"COALESCE({', '.join(found)}, NULL) AS {NAME}" if found else ""


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA source.table_info({table})")}


def _kept_ranges(db: sqlite3.Connection, tables: set[str]) -> str:
    """The condition for ranges and domains of this project; if there are none, for all of them."""
    have = _columns(db, nsys.RANGES)
    if not {"eventType", "textId"} <= have or "StringIds" not in tables:
        return "1"
    inline = "text" if "text" in have else "NULL"
    text = f"COALESCE({inline}, (SELECT value FROM temp.texts WHERE id = textId LIMIT 1))"
    events = f"eventType IN ({nsys.PUSH_POP}, {nsys.START_END})"
    ours = f"({events} AND is_ours({text}))"
    if db.execute(f"SELECT 1 FROM source.{nsys.RANGES} WHERE {ours} LIMIT 1").fetchone():
        return f"{ours} OR (eventType = {nsys.DOMAIN_CREATED} AND {text} = '{DOMAIN}')"
    return f"{events} OR eventType = {nsys.DOMAIN_CREATED}"


def _shrink_kineto(source: Path, target: Path) -> None:
    header: dict[str, Any] = {}
    with opened_text(source) as file:
        read = {*kineto.KINDS, *kineto.CALLS, kineto.ANNOTATION}
        spans = [
            _span(kind, event)
            for kind, event in kineto.spans(source.name, read_items(file), header)
            if kind in read
        ]
    has_ours = any(span["cat"] == kineto.ANNOTATION and is_label(span["name"]) for span in spans)
    launched = {span["args"].get("correlation") for span in spans if span["cat"] in kineto.KINDS} - {None}
    kept = [
        span
        for span in spans
        if span["cat"] in kineto.KINDS
        or (span["cat"] in kineto.CALLS and span["args"].get("correlation") in launched)
        or (span["cat"] == kineto.ANNOTATION and (not has_ours or is_label(span["name"])))
    ]
    starts = [kineto.nanoseconds(span["ts"]) for span in kept]
    base = min(starts) if max(map(abs, starts)) >= EXACT_NS else 0
    for span, start in zip(kept, starts, strict=True):
        span["ts"] = _microseconds(start - base)
        if span.get("dur") is not None:
            span["dur"] = _microseconds(kineto.nanoseconds(span["dur"]))
    small: dict[str, Any] = {"schemaVersion": kineto.KNOWN_SCHEMA, "traceEvents": kept}
    distributed = header.get("distributedInfo") or {}
    if told := {name: distributed[name] for name in ("rank", "world_size") if name in distributed}:
        small["distributedInfo"] = told
    if base := base + int(header.get("baseTimeNanoseconds") or 0):
        small["baseTimeNanoseconds"] = base
    target.write_text(json.dumps(small, separators=(",", ":")))


def _span(kind: str, event: kineto.Event) -> dict[str, Any]:
    """What is kept of an event."""
    kept = {name: event[name] for name in ("ph", "ts", "dur", "pid", "tid") if name in event}
    wanted = WORK_ARGS if kind in kineto.KINDS else ("correlation",)
    args = {name: event["args"][name] for name in wanted if name in event["args"]}
    return {**kept, "cat": kind, "name": without_folders(printable(event.get("name"))), "args": args}


def _microseconds(nanoseconds: int) -> float:
    return nanoseconds / 1000 if nanoseconds % 1000 else nanoseconds // 1000


def main() -> None:
    """Run `python -m overlap_mtp.profiling.shrink SOURCE TARGET`. Exit status 2: it could not be done."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        shrink(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ProfileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
