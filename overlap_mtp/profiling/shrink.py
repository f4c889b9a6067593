"""Makes a profile small and anonymous: keeps what is read and nothing else.

    python -m overlap_mtp.profiling.shrink out/modes.sqlite profiles/modes.sqlite.gz

An export of Nsight Systems holds the environment, host name, command line and paths of the machine. Of the ranges
those of this project are kept, or all where there are none of them; folders are cut from every text.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from overlap_mtp.profiling import kineto, nsys
from overlap_mtp.profiling.read import GZIP, SQLITE, read_profile
from overlap_mtp.profiling.trace import ProfileError
from overlap_mtp.tracing import DOMAIN, LABEL

FOLDERS = re.compile(r"(?:[\w.~-]*/)+(?=[\w.-])")
CALL_ARGS = ("correlation",)
WORK_ARGS = (
    "device",
    "stream",
    "correlation",
    "bytes",
    "In msg nelems",
    "dtype",
    "fromDevice",
    "toDevice",
    "graph node id",
)


def slim(source: Path, target: Path) -> None:
    """Writes the part of a profile that the report reads, gzipped. Raises ProfileError where `source` is none."""
    read_profile(source)  # says what is wrong with it
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain", Path(folder) / "small"
        opened = gzip.open if _begins_with(source, GZIP) else open
        with opened(source, "rb") as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file)
        (_slim_nsys if _begins_with(plain, SQLITE) else _slim_kineto)(plain, small)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Neither name nor time of day: the same profile gives the same bytes.
        with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
            stream.write(small.read_bytes())


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def without_folders(text: str | None) -> str | None:
    """`/home/me/run.py` becomes `run.py`."""
    return None if text is None else FOLDERS.sub("", text)


def _slim_nsys(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(target)) as db:
        db.create_function("without_folders", 1, without_folders, deterministic=True)
        db.create_function("is_ours", 1, lambda text: bool(LABEL.match(text or "")), deterministic=True)
        db.execute("ATTACH ? AS source", (str(source),))
        tables = {row[0] for row in db.execute("SELECT name FROM source.sqlite_master")}
        for table in sorted(tables & {*nsys.TABLES.values()}):
            _copy(db, table, (*nsys.ACTIVITY, *nsys.ACTIVITY_MORE, _kernel_name(db, table)))
        _copy(db, nsys.CALLS, nsys.CALL, f"correlationId IN ({_launched(tables)})")
        _copy(db, nsys.NODES, (*nsys.NODE, *nsys.NODE_MORE))
        _copy(db, nsys.RANGES, (*nsys.RANGE, *nsys.RANGE_MORE), _kept_ranges(db, tables))
        _copy(db, "META_DATA_EXPORT", ("name", "value"), "name = 'EXPORT_SCHEMA_VERSION'")
        _copy(db, "StringIds", ("id", "value"), f"id IN ({_named(db)})")
        if "StringIds" in tables:
            db.execute("UPDATE StringIds SET value = without_folders(value)")
        if "text" in _columns(db, "main", nsys.RANGES):
            db.execute(f"UPDATE {nsys.RANGES} SET text = without_folders(text)")
        db.commit()
        db.execute("DETACH source")
        db.execute("VACUUM")


def _copy(db: sqlite3.Connection, table: str, columns: Iterable[str], condition: str = "1") -> None:
    have = _columns(db, "source", table)
    kept = ", ".join(f'"{column}"' for column in dict.fromkeys(columns) if column in have)
    if kept:
        db.execute(f"CREATE TABLE main.{table} AS SELECT {kept} FROM source.{table} WHERE {condition}")


def _columns(db: sqlite3.Connection, schema: str, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA {schema}.table_info({table})")}


def _kernel_name(db: sqlite3.Connection, table: str) -> str:
    have = _columns(db, "source", table)
    return next((name for name in nsys.KERNEL_NAMES if name in have), nsys.KERNEL_NAMES[0])


def _launched(tables: set[str]) -> str:
    """The correlations of all activities."""
    return " UNION ".join(
        f"SELECT correlationId FROM source.{table}" for table in sorted(tables & {*nsys.TABLES.values()})
    )


def _kept_ranges(db: sqlite3.Connection, tables: set[str]) -> str:
    """Ranges and domains of this project; where there are none, all of them."""
    have = _columns(db, "source", nsys.RANGES)
    if not {"eventType", "textId"} <= have or "StringIds" not in tables:
        return "1"
    inline = "text" if "text" in have else "NULL"
    text = f"COALESCE({inline}, (SELECT value FROM source.StringIds WHERE id = textId))"
    events = f"eventType IN ({nsys.PUSH_POP}, {nsys.START_END})"
    ours = f"({events} AND is_ours({text})) OR (eventType = {nsys.DOMAIN_CREATED} AND {text} = '{DOMAIN}')"
    if db.execute(
        f"SELECT 1 FROM source.{nsys.RANGES} WHERE {events} AND is_ours({text}) LIMIT 1"
    ).fetchone():
        return ours
    return f"{events} OR eventType = {nsys.DOMAIN_CREATED}"


def _named(db: sqlite3.Connection) -> str:
    """The strings that what was copied refers to."""
    users = [(table, name) for table in nsys.TABLES.values() for name in nsys.KERNEL_NAMES]
    users.append((nsys.RANGES, "textId"))
    used = [
        f"SELECT {name} FROM main.{table}" for table, name in users if name in _columns(db, "main", table)
    ]
    return " UNION ".join(used) or "NULL"


def _slim_kineto(source: Path, target: Path) -> None:
    document = json.loads(source.read_text(encoding="utf-8", errors="replace"))
    header = document if isinstance(document, dict) else {"traceEvents": document}
    spans = list(kineto.spans(header["traceEvents"]))
    ours = any(kind == kineto.ANNOTATION and LABEL.match(event["name"]) for kind, event in spans)
    launched = {event.get("args", {}).get("correlation") for kind, event in spans if kind in kineto.KINDS}
    events = []
    for kind, event in spans:
        args = event.get("args", {})
        if kind in kineto.KINDS:
            events.append(_slim_event(kind, event, WORK_ARGS))
        elif kind in kineto.CALLS and args.get("correlation") in launched:
            events.append(_slim_event(kind, event, CALL_ARGS))
        elif kind == kineto.ANNOTATION and (not ours or LABEL.match(event["name"])):
            events.append(_slim_event(kind, event, ()))
    small: dict[str, Any] = {"schemaVersion": kineto.KNOWN_SCHEMA, "traceEvents": events}
    if isinstance(header.get("distributedInfo"), dict) and "rank" in header["distributedInfo"]:
        small["distributedInfo"] = {"rank": header["distributedInfo"]["rank"]}
    target.write_text(json.dumps(small, separators=(",", ":")))


def _slim_event(category: str, event: kineto.Event, args: Iterable[str]) -> dict[str, Any]:
    kept = {name: event[name] for name in ("ph", "ts", "dur", "pid", "tid") if name in event}
    details = {name: event["args"][name] for name in args if name in event.get("args", {})}
    return {**kept, "cat": category, "name": without_folders(event["name"]), "args": details}


def main() -> None:
    """`slim.py SOURCE TARGET`."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        slim(Path(sys.argv[1]), Path(sys.argv[2]))
    except ProfileError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
