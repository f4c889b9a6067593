"""Files that are no profiles, or say little: a clear message about each, never a traceback or a silent zero."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from overlap_mtp.profiling import ProfileError, read_profile, report_on

from handmade import Process, Span, Work, kineto_document, write_kineto, write_nsys

WORK = [Work("ncclDevKernel_AllReduce", 1, 20, 40), Work("gemm", 2, 30, 60, stream=9)]
PROCESS = Process(77, [Span("step prefetch r0", 0, 50), Span("send-recv r0", 0.5, 1.5)], WORK)
KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"


def export(folder: Path, change: str = "", version: str = "3.20.2") -> Path:
    path = write_nsys(folder / "a.sqlite", [PROCESS], version)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    return path


def changed(change: str = "", version: str = "3.20.2") -> bytes:
    with TemporaryDirectory() as folder:
        return export(Path(folder), change, version).read_bytes()


def part_of(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


def trace(**changes: object) -> bytes:
    return json.dumps({**kineto_document(PROCESS), **changes}).encode()


NO_KERNELS = f"DROP TABLE {KERNELS};"
ONLY_METADATA = NO_KERNELS + "".join(
    f"DROP TABLE {table};" for table in ("StringIds", "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_RUNTIME")
)
ANY_SQLITE = ONLY_METADATA + "DROP TABLE META_DATA_EXPORT"
BAD_EVENT = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": "soon", "dur": 1, "args": {}}
BROKEN_GZIP = bytearray(gzip.compress(bytes(range(256)) * 40))
BROKEN_GZIP[12:40] = bytes(28)
FAILURES = {
    "an empty file": ("a.sqlite", b"", "the file is empty"),
    "blanks": ("a.json", b"  \n", "the file is empty"),
    "words": ("a.sqlite", b"not a profile, just words", "not a profile"),
    "a report": ("a.nsys-rep", b"NSYS\x01\x02", "nsys export --type sqlite a.nsys-rep"),
    "any SQLite": ("a.sqlite", changed(ANY_SQLITE), "not an export of Nsight Systems"),
    "future schema": ("a.sqlite", changed(version="4.0.1"), "schema version 4.0.1 is not known"),
    "missing column": ("a", changed(f"ALTER TABLE {KERNELS} DROP streamId"), "KERNEL has no column streamId"),
    "no GPU": ("a.sqlite", changed(NO_KERNELS), "was the GPU traced"),
    "only metadata": ("a.sqlite", changed(ONLY_METADATA), "was the GPU traced"),
    "no rows": ("a.sqlite", changed(f"DELETE FROM {KERNELS}"), "the profile is empty"),
    "torn row": ("a.sqlite", changed(f"UPDATE {KERNELS} SET start = 'soon'"), "damaged or not complete"),
    "half an SQLite": ("a.sqlite", part_of(changed(), 0.5), "is not complete: it ends after"),
    "half a gzip": ("a.sqlite.gz", part_of(gzip.compress(changed()), 0.5), "ended before"),
    "gzipped words": ("words.gz", gzip.compress(b"words"), "not a profile"),
    "broken gzip": ("a.sqlite.gz", BROKEN_GZIP, ""),
    "half a trace": ("a.json", part_of(trace(), 0.7), "not complete JSON"),
    "any JSON": ("a.json", b'{"rows": []}', "not a trace of torch.profiler"),
    "a list": ("a.json", b"[1, 2]", "not a trace of torch.profiler"),
    "future trace": ("a.json", trace(schemaVersion=9), "schema version 9 is not known"),
    "no events": ("a.json", trace(traceEvents=[]), "the profile is empty"),
    "bad event": ("a.json", trace(traceEvents=[BAD_EVENT]), "cannot be read"),
}
FAILURES |= {
    f"{part} of an SQLite": ("a", part_of(changed(), part), "") for part in (0.1, 0.3, 0.7, 0.9, 0.99)
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_is_no_profile_is_named_with_the_reason(tmp_path, failure):
    name, content, reason = FAILURES[failure]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProfileError, match=rf"^{name}: .*{re.escape(reason)}"):
        read_profile(tmp_path / name)


def test_a_path_without_a_file_is_named_with_the_reason(tmp_path):
    for path, reason in ((tmp_path / "none.sqlite", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ProfileError, match=f"^{path.name}: {reason}"):
            read_profile(path)


OLD_SCHEMA = "".join(
    f"ALTER TABLE {KERNELS} DROP {column};"
    for column in ("shortName", "graphNodeId", "globalPid", "contextId")
) + (
    "ALTER TABLE NVTX_EVENTS DROP uint64Value; DROP TABLE META_DATA_EXPORT;"
    "UPDATE NVTX_EVENTS SET text = (SELECT value FROM StringIds WHERE id = textId) WHERE eventType = 59;"
)
FULL = "rank 0 | prefetch | send-recv | exchange | 20.0 | 10.0"
LESS = {  # what an export lacks -> how to take it away, and the row that is left
    "columns of this version": (OLD_SCHEMA, FULL),
    "calls": (
        "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME",
        FULL.replace("prefetch | send-recv | exchange", "outside steps | no range | model"),
    ),
    "ranges": ("DROP TABLE NVTX_EVENTS", "process 77 device 0 | all | no range | model | 20.0 | 10.0"),
    "ends of ranges": ("UPDATE NVTX_EVENTS SET end = NULL", FULL.replace("20.0 | 10.0", "40.0 | 0.0")),
    "the end of a kernel": (
        f"UPDATE {KERNELS} SET end = 0 WHERE start = 20000",
        FULL.replace("20.0 | 10.0", "0.0 | 0.0"),
    ),
}


@pytest.mark.parametrize("missing", LESS)
def test_an_export_is_read_as_far_as_it_goes(tmp_path, missing):
    change, expected = LESS[missing]
    found = report_on([read_profile(export(tmp_path, change))])
    (row,) = found.rows
    values = (row.device, row.schedule, row.range, row.kind, row.time_us, row.hidden_us)
    assert " | ".join(map(str, values)) == expected
    assert (row.bytes, row.launches) == (None, 2 if missing == "ends of ranges" else 1)
    assert (row.hidden_fraction is None) == (row.time_us == 0)
    assert ("lacks the CUDA runtime calls" in " ".join(found.notes)) == (missing == "calls")


def test_ours_without_prefetch_is_not_judged(tmp_path):
    process = Process(5, [Span("step sync r0", 0, 9), Span("send-recv r0", 0, 9)], [Work("put", 1, 2, 3)])
    found = report_on([read_profile(write_nsys(tmp_path / "a.sqlite", [process]))])
    assert found.judged() == ("the exchange in prefetch steps", None)


@pytest.fixture
def run_report(monkeypatch, capsys):
    """Run profiles/report.py in this process; return its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(Path(__file__).parents[2] / "profiles" / "report.py"), run_name="__main__")
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_reports_and_judges(tmp_path, run_report):
    path = tmp_path / "a.sqlite.gz"
    path.write_bytes(gzip.compress(changed()))
    out = tmp_path / "new" / "report.json"
    status, said, _ = run_report(path, "--json", out, "--min-hidden", 0.5)
    assert status == 0
    assert "send-recv" in said
    assert "ok: 50.0 % of the exchange in prefetch steps is hidden" in said
    written = json.loads(out.read_text())
    assert written["judged"] == {"what": "the exchange in prefetch steps", "hidden_fraction": 0.5}
    assert written["sources"] == ["a.sqlite.gz"]
    assert written["rows"][0]["hidden_us"] == 10

    status, said, _ = run_report(path, "--min-hidden", 0.51)
    assert status == 1
    assert "FAILED: 50.0 % of the exchange" in said


def test_the_command_says_what_is_wrong(tmp_path, run_report):
    path, words = export(tmp_path), tmp_path / "words"
    words.write_text("words")
    for arguments in ((path, "--json", path / "under-a-file.json"), (words,)):
        status, _, errors = run_report(*arguments)
        assert status == 2
        assert errors.startswith("error: ")


def test_a_profile_without_communication_says_so_and_does_not_pass(tmp_path, run_report):
    gemm = Process(5, [Span("forward", 0, 9, domain=None)], [Work("gemm", 1, 2, 3)])
    path = write_kineto(tmp_path / "a.json", gemm)
    status, said, _ = run_report(path, "--min-hidden", 0)
    assert status == 1
    assert "No communication" in said
    assert "nothing to judge" in said
    assert run_report(path)[0] == 0
