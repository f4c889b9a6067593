"""Make a profile small and anonymous: keep what is read and nothing else.

    python -m overlap_mtp.profiling.shrink out/modes.sqlite profiles/modes.sqlite.gz

An export of Nsight Systems holds the environment, host name, command line and paths of the machine. Of the ranges
only those of this project are kept, or all of them if there are none of this project. Folders are cut from all texts.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from overlap_mtp.profiling import kineto, nsys
from overlap_mtp.profiling.read import SQLITE, read_profile, starts_with, unpacked
from overlap_mtp.profiling.trace import ProfileError
from overlap_mtp.tracing import DOMAIN, LABEL

FOLDERS = re.compile(r"(?:[\w.~-]*/)+(?=[\w.-])")
WORK_ARGS = (
    *("device", "stream", "correlation", "bytes", "In msg nelems", "dtype"),
    *("fromDevice", "toDevice", "graph node id"),
)


def shrink(source: Path, target: Path) -> None:
    """Write the part of a profile that the report reads, gzipped.

    Args:
        source: a profile, gzipped or not.
        target: the file to write, in a folder that need not exist. The same profile always gives the same bytes.

    Raises:
        ProfileError: `source` is no profile; nothing is written.
    """
    read_profile(source)
    with unpacked(source) as plain, tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        (_shrink_nsys if starts_with(plain, SQLITE) else _shrink_kineto)(plain, small)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
            stream.write(small.read_bytes())


def without_folders(text: str | None) -> str | None:
    """Return `run.py` for `/home/me/run.py`, in any text."""
    return None if text is None else FOLDERS.sub("", text)


def _shrink_nsys(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(target)) as db:
        db.create_function("without_folders", 1, without_folders, deterministic=True)
        db.create_function("is_ours", 1, lambda text: bool(LABEL.match(text or "")), deterministic=True)
        db.execute("ATTACH ? AS source", (str(source),))
        tables = {row[0] for row in db.execute("SELECT name FROM source.sqlite_master")}
        activities = sorted(tables & {*nsys.TABLES.values()})
        strings = []  # selects the ids of strings that are kept
        for table in activities:
            kept = (*nsys.ACTIVITY, *nsys.ACTIVITY_MORE)
            name = next((name for name in nsys.KERNEL_NAMES if name in _columns(db, table)), None)
            _copy(db, table, (*kept, name) if name else kept)
            strings += [f"SELECT {name} FROM main.{table}"] if name else []
        launched = " UNION ".join(f"SELECT correlationId FROM source.{table}" for table in activities)
        _copy(db, nsys.CALLS, nsys.CALL, f"correlationId IN ({launched})")
        _copy(db, nsys.NODES, (*nsys.NODE, *nsys.NODE_MORE))
        _copy(db, nsys.RANGES, (*nsys.RANGE, *nsys.RANGE_MORE), _kept_ranges(db, tables))
        if "textId" in _columns(db, nsys.RANGES):
            strings.append(f"SELECT textId FROM main.{nsys.RANGES}")
        _copy(db, "META_DATA_EXPORT", ("name", "value"), "name = 'EXPORT_SCHEMA_VERSION'")
        _copy(db, "StringIds", ("id", "value"), f"id IN ({' UNION '.join(strings) or 'NULL'})")
        for table, column in (("StringIds", "value"), (nsys.RANGES, "text")):
            if column in _columns(db, table):
                db.execute(f"UPDATE main.{table} SET {column} = without_folders({column})")
        db.commit()
        db.execute("DETACH source")
        db.execute("VACUUM")


def _copy(db: sqlite3.Connection, table: str, columns: Sequence[str], condition: str = "1") -> None:
    """Copy these columns of a table, as far as they exist, in the rows that meet the condition."""
    have = _columns(db, table)
    if kept := ", ".join(f'"{column}"' for column in columns if column in have):
        db.execute(f"CREATE TABLE main.{table} AS SELECT {kept} FROM source.{table} WHERE {condition}")


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA source.table_info({table})")}


def _kept_ranges(db: sqlite3.Connection, tables: set[str]) -> str:
    """The condition for ranges and domains of this project; if there are none, for all of them."""
    have = _columns(db, nsys.RANGES)
    if not {"eventType", "textId"} <= have or "StringIds" not in tables:
        return "1"
    inline = "text" if "text" in have else "NULL"
    text = f"COALESCE({inline}, (SELECT value FROM source.StringIds WHERE id = textId))"
    events = f"eventType IN ({nsys.PUSH_POP}, {nsys.START_END})"
    ours = f"({events} AND is_ours({text}))"
    if db.execute(f"SELECT 1 FROM source.{nsys.RANGES} WHERE {ours} LIMIT 1").fetchone():
        return f"{ours} OR (eventType = {nsys.DOMAIN_CREATED} AND {text} = '{DOMAIN}')"
    return f"{events} OR eventType = {nsys.DOMAIN_CREATED}"


def _shrink_kineto(source: Path, target: Path) -> None:
    document = json.loads(source.read_text(encoding="utf-8", errors="replace"))
    header = document if isinstance(document, dict) else {"traceEvents": document}
    spans = list(kineto.spans(header["traceEvents"]))
    has_ours = any(kind == kineto.ANNOTATION and LABEL.match(event["name"]) for kind, event in spans)
    launched = {event.get("args", {}).get("correlation") for kind, event in spans if kind in kineto.KINDS}
    events = []
    for kind, event in spans:
        args = event.get("args", {})
        is_call = kind in kineto.CALLS and args.get("correlation") in launched
        is_range = kind == kineto.ANNOTATION and (not has_ours or LABEL.match(event["name"]))
        if kind in kineto.KINDS or is_call or is_range:
            kept = {name: event[name] for name in ("ph", "ts", "dur", "pid", "tid") if name in event}
            wanted = WORK_ARGS if kind in kineto.KINDS else ("correlation",)
            details = {name: args[name] for name in wanted if name in args}
            events.append({**kept, "cat": kind, "name": without_folders(event["name"]), "args": details})
    small: dict[str, Any] = {"schemaVersion": kineto.KNOWN_SCHEMA, "traceEvents": events}
    if "rank" in (header.get("distributedInfo") or {}):
        small["distributedInfo"] = {"rank": header["distributedInfo"]["rank"]}
    target.write_text(json.dumps(small, separators=(",", ":")))


def main() -> None:
    """Run `python -m overlap_mtp.profiling.shrink SOURCE TARGET`."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        shrink(Path(sys.argv[1]), Path(sys.argv[2]))
    except ProfileError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
