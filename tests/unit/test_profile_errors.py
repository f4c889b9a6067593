"""Files that are no profiles, or say little: a clear word about each, never a traceback or a silent zero."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from overlap_mtp.profiling import ProfileError, read_profile, report_on

from handmade import NsysWriter, Process, Span, Work, kineto_document, write_kineto, write_nsys

ROOT = Path(__file__).parents[2]
WORK = [Work("ncclDevKernel_AllReduce", 1, 20, 40), Work("gemm", 2, 30, 60, stream=9)]
PROCESS = Process(77, [Span("step prefetch r0", 0, 50), Span("send-recv r0", 0.5, 1.5)], WORK)


def nsys(path: Path, change: str = "", version: str = "3.20.2") -> Path:
    write_nsys(path, [PROCESS], version)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    return path


def truncated(path: Path, part: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return path


def compressed(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def trace(path: Path, **changes: object) -> Path:
    return text(path, json.dumps({**kineto_document(PROCESS), **changes}))


def drop_all(*tables: str) -> str:
    return "".join(f"DROP TABLE {table};" for table in tables)


EMPTIED = "DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL"
NO_COLUMN = "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN streamId"
TORN = "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'soon'"
BAD_EVENT = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": "soon", "dur": 1, "args": {}}
FAILURES = {
    "no file": (lambda d: d / "none.sqlite", "No such file"),
    "a folder": (lambda d: d, "Is a directory"),
    "an empty file": (lambda d: text(d / "a.sqlite", ""), "the file is empty"),
    "blanks": (lambda d: text(d / "a.json", "  \n"), "the file is empty"),
    "words": (lambda d: text(d / "a.sqlite", "not a profile, just words"), "not a profile"),
    "a report": (lambda d: text(d / "a.nsys-rep", "NSYS\x01\x02"), "nsys export --type sqlite a.nsys-rep"),
    "any SQLite": (lambda d: nsys_without_tables(d / "a.sqlite"), "not an export of Nsight Systems"),
    "future schema": (lambda d: nsys(d / "a.sqlite", version="4.0.1"), "schema version 4.0.1 is not known"),
    "missing column": (lambda d: nsys(d / "a.sqlite", NO_COLUMN), "KERNEL has no column streamId"),
    "no GPU": (lambda d: nsys(d / "a.sqlite", drop_all("CUPTI_ACTIVITY_KIND_KERNEL")), "was the GPU traced"),
    "no rows": (lambda d: nsys(d / "a.sqlite", EMPTIED), "the profile is empty"),
    "torn row": (lambda d: nsys(d / "a.sqlite", TORN), "damaged or not complete"),
    "half an SQLite": (lambda d: truncated(nsys(d / "a.sqlite"), 0.5), "is not complete: it ends after"),
    "half a gzip": (lambda d: truncated(compressed(nsys(d / "a.sqlite")), 0.5), "ended before"),
    "gzipped words": (lambda d: compressed(text(d / "words", "words")), "not a profile"),
    "broken gzip": (lambda d: broken_gzip(d / "a.sqlite.gz"), "a.sqlite.gz"),
    "half a trace": (lambda d: truncated(trace(d / "a.json"), 0.7), "not complete JSON"),
    "any JSON": (lambda d: text(d / "a.json", '{"rows": []}'), "not a trace of torch.profiler"),
    "a list": (lambda d: text(d / "a.json", "[1, 2]"), "not a trace of torch.profiler"),
    "future trace": (lambda d: trace(d / "a.json", schemaVersion=9), "schema version 9 is not known"),
    "no events": (lambda d: trace(d / "a.json", traceEvents=[]), "the profile is empty"),
    "bad event": (lambda d: trace(d / "a.json", traceEvents=[BAD_EVENT]), "cannot be read"),
}


def nsys_without_tables(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE people (name TEXT); INSERT INTO people VALUES ('x')")
    return path


def broken_gzip(path: Path) -> Path:
    whole = bytearray(gzip.compress(bytes(range(256)) * 40))
    whole[12:40] = bytes(28)
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("failure", FAILURES)
def test_what_is_no_profile_is_named_with_the_reason(tmp_path, failure):
    make, reason = FAILURES[failure]
    path = make(tmp_path)
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    assert str(caught.value).startswith(f"{path.name}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.7, 0.9, 0.99])
def test_a_truncated_export_is_never_half_a_report(tmp_path, part):
    with pytest.raises(ProfileError):
        read_profile(truncated(nsys(tmp_path / "a.sqlite"), part))


def test_a_schema_of_another_version_is_read_as_far_as_it_goes(tmp_path):
    change = "".join(
        f"ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN {column};"
        for column in ("shortName", "graphNodeId", "globalPid", "contextId")
    )
    change += "ALTER TABLE NVTX_EVENTS DROP COLUMN uint64Value;" + drop_all("META_DATA_EXPORT")
    change += (
        "UPDATE NVTX_EVENTS SET text = (SELECT value FROM StringIds WHERE id = textId) WHERE eventType = 59;"
    )
    found = report_on([read_profile(nsys(tmp_path / "a.sqlite", change))])
    (row,) = found.rows
    assert (row.device, row.range, row.time_us, row.hidden_us, row.bytes) == (
        "rank 0",
        "send-recv",
        20,
        10,
        None,
    )


def test_without_runtime_calls_names_decide_and_that_is_said(tmp_path):
    path = nsys(tmp_path / "a.sqlite", drop_all("CUPTI_ACTIVITY_KIND_RUNTIME"))
    found = report_on([read_profile(path)])
    assert [(row.schedule, row.range, row.kind) for row in found.rows] == [
        ("outside steps", "no range", "model")
    ]
    assert "lacks the CUDA runtime calls" in " ".join(found.notes)


def test_without_ranges(tmp_path):
    found = report_on([read_profile(nsys(tmp_path / "a.sqlite", drop_all("NVTX_EVENTS")))])
    assert [(row.range, row.hidden_us) for row in found.rows] == [("no range", 10)]


def test_a_range_that_was_open_when_the_capture_stopped(tmp_path):
    process = Process(77, [Span("step prefetch r0", 0, None), Span("send-recv r0", 0.5, None)], WORK)
    found = report_on([read_profile(write_nsys(tmp_path / "a.sqlite", [process]))])
    assert found.rows[0].range == "send-recv"
    assert found.rows[0].schedule == "prefetch"


def test_an_activity_without_an_end(tmp_path):
    """A kernel that was still running has end 0: it counts as launched, and takes no time."""
    path = nsys(tmp_path / "a.sqlite", "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET end = 0 WHERE start = 20000")
    (row,) = report_on([read_profile(path)]).rows
    assert (row.time_us, row.hidden_fraction, row.launches) == (0, None, 1)


def test_nothing_but_metadata(tmp_path):
    writer = NsysWriter()
    writer.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.1.0")
    writer.write(tmp_path / "a.sqlite")
    with pytest.raises(ProfileError, match="was the GPU traced"):
        read_profile(tmp_path / "a.sqlite")


def run_report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "profiles/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_reports_and_judges(tmp_path):
    path = compressed(nsys(tmp_path / "a.sqlite"))
    out = tmp_path / "new" / "report.json"
    done = run_report(path, "--json", out, "--min-hidden", 0.5)
    assert done.returncode == 0, done.stderr
    assert "send-recv" in done.stdout
    assert "ok: 50.0 % of the exchange in prefetch steps is hidden" in done.stdout
    written = json.loads(out.read_text())
    assert written["judged"] == {"what": "the exchange in prefetch steps", "hidden_fraction": 0.5}
    assert written["sources"] == ["a.sqlite.gz"]
    assert written["rows"][0]["hidden_us"] == 10

    done = run_report(path, "--min-hidden", 0.51)
    assert done.returncode == 1
    assert "FAILED: 50.0 % of the exchange" in done.stdout


@pytest.mark.parametrize("kind", ["damaged", "unwritable"])
def test_the_command_says_what_is_wrong(tmp_path, kind):
    path = nsys(tmp_path / "a.sqlite")
    if kind == "damaged":
        done = run_report(truncated(path, 0.5))
    else:
        done = run_report(path, "--json", path / "under-a-file.json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr


def test_a_profile_without_communication_says_so_and_does_not_pass(tmp_path):
    gemm = Process(5, [Span("forward", 0, 9, domain=None)], [Work("gemm", 1, 2, 3)])
    path = write_kineto(tmp_path / "a.json", gemm)
    done = run_report(path, "--min-hidden", 0)
    assert done.returncode == 1
    assert "No communication" in done.stdout
    assert "nothing to judge" in done.stdout
    assert run_report(path).returncode == 0


def test_ours_without_prefetch_is_not_judged(tmp_path):
    process = Process(5, [Span("step sync r0", 0, 9), Span("send-recv r0", 0, 9)], [Work("put", 1, 2, 3)])
    found = report_on([read_profile(write_nsys(tmp_path / "a.sqlite", [process]))])
    assert found.judged() == ("the exchange in prefetch steps", None)
