"""Files that are no profiles, or say little: a clear message about each, never a traceback or a silent zero."""

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
ROOT = Path(__file__).parents[2]
KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"


def export(folder: Path, change: str = "", version: str = "3.20.2") -> Path:
    path = write_nsys(folder / "a.sqlite", [PROCESS], version)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(change)
    return path


def changed(change: str = "", version: str = "3.20.2") -> bytes:
    with TemporaryDirectory() as folder:
        return export(Path(folder), change, version).read_bytes()


def trace(**changes: object) -> bytes:
    return json.dumps({**kineto_document(PROCESS), **changes}).encode()


EXPORT = changed()
NO_KERNELS = f"DROP TABLE {KERNELS};"
ONLY_METADATA = NO_KERNELS + "DROP TABLE NVTX_EVENTS; DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME;"
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
    "half an SQLite": ("a.sqlite", EXPORT[: len(EXPORT) // 2], "is not complete: it ends after"),
    "half a gzip": ("a.sqlite.gz", gzip.compress(EXPORT)[: len(EXPORT) // 40], "ended before"),
    "gzipped words": ("words.gz", gzip.compress(b"words"), "not a profile"),
    "broken gzip": ("a.sqlite.gz", BROKEN_GZIP, ""),
    "no deflate": ("a.sqlite.gz", gzip.compress(EXPORT)[:10] + b"\xff" * 99, "Error -3 while decompressing"),
    "half a trace": ("a.json", trace()[:-200], "not complete JSON"),
    "any JSON": ("a.json", b'{"rows": []}', "not a trace of torch.profiler"),
    "a list": ("a.json", b"[1, 2]", "not a trace of torch.profiler"),
    "future trace": ("a.json", trace(schemaVersion=9), "schema version 9 is not known"),
    "no events": ("a.json", trace(traceEvents=[]), "the profile is empty"),
    "bad event": ("a.json", trace(traceEvents=[BAD_EVENT]), "cannot be read"),
}
FAILURES |= {
    f"{part} of an SQLite": ("a", EXPORT[: int(len(EXPORT) * part)], "")
    for part in (0.1, 0.3, 0.7, 0.9, 0.99)
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


OLD_SCHEMA = f"""
    ALTER TABLE {KERNELS} DROP shortName; ALTER TABLE {KERNELS} DROP graphNodeId;
    ALTER TABLE {KERNELS} DROP globalPid; ALTER TABLE {KERNELS} DROP contextId;
    ALTER TABLE NVTX_EVENTS DROP uint64Value; DROP TABLE META_DATA_EXPORT;
    UPDATE NVTX_EVENTS SET text = (SELECT value FROM StringIds WHERE id = textId) WHERE eventType = 59;
"""
NO_END = f"UPDATE {KERNELS} SET end = 0 WHERE start = 20000"
OURS = "rank 0 | prefetch | send-recv | exchange"
LESS = {  # what an export lacks -> how to take it away, and the row that is left
    "columns": (OLD_SCHEMA, f"{OURS} | 20.0 | 10.0"),
    "calls": (
        "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME",
        "rank 0 | outside steps | no range | model | 20.0 | 10.0",
    ),
    "ranges": ("DROP TABLE NVTX_EVENTS", "process 77 device 0 | all | no range | model | 20.0 | 10.0"),
    "ends of ranges": ("UPDATE NVTX_EVENTS SET end = NULL WHERE start > 0", f"{OURS} | 40.0 | 0.0"),
    "the end of a kernel": (NO_END, f"{OURS} | 0.0 | 0.0"),
}


@pytest.mark.parametrize("missing", LESS)
def test_an_export_is_read_as_far_as_it_goes(tmp_path, missing):
    change, expected = LESS[missing]
    found = report_on([read_profile(export(tmp_path, change))], outside_steps=True)
    (row,) = found.rows
    values = (row.device, row.schedule, row.range, row.kind, row.time_us, row.hidden_us)
    assert " | ".join(map(str, values)) == expected
    assert (row.bytes, row.launches) == (None, 2 if missing == "ends of ranges" else 1)
    assert (row.hidden_fraction is None) == (row.time_us == 0)
    assert ("lacks the CUDA runtime calls" in " ".join(found.notes)) == (missing == "calls")


def test_the_command_reports_and_judges(tmp_path, monkeypatch, capsys):
    path, out, command = tmp_path / "a.sqlite.gz", tmp_path / "new", ROOT / "profiles" / "report.py"
    path.write_bytes(gzip.compress(EXPORT))
    gemm = Process(5, [Span("forward", 0, 9, domain=None)], [Work("gemm", 1, 2, 3)])
    quiet = write_kineto(tmp_path / "a.json", gemm)
    monkeypatch.chdir(tmp_path)
    for arguments, status, message in (
        (
            (path, "--json", out / "a.json", "--min-hidden", 0.5),
            0,
            "ok: 50.0 % of the exchange in prefetch steps is hidden on the worst device, at least 50.0 % is wanted; "
            "join and unroll take 0.0 µs of a step on the slowest device",
        ),
        ((path, "--min-hidden", 0.51, "--plot", out / "a.png"), 1, "FAILED: 50.0 % of the exchange"),
        ((quiet, "--min-hidden", 0), 1, "nothing to judge"),
        ((quiet,), 0, "No communication"),
        ((path, "--json", path / "under-a-file.json"), 2, "error: "),
        ((tmp_path,), 2, "error: "),
        ((path, "--plot", out / "a.txt"), 2, "error: a.txt: a picture cannot be written as .txt"),
        ((path, "--json", path), 2, "error: a.sqlite.gz: --json would overwrite the profile"),
        ((path, "--perfetto", path), 2, "error: a.sqlite.gz: --perfetto would overwrite the profile"),
        (
            (path, "--perfetto", out / "a.pftrace"),
            2,
            "error: a.pftrace: --perfetto writes JSON: name a file that",
        ),
        (
            (path, "--json", "b.json", "--perfetto", "b.json"),
            2,
            "error: b.json: --json and --perfetto name one",
        ),
        (
            (path, "--json", "b.json", "--plot", "b.png", "--perfetto", "b.json.gz"),
            0,
            "Schedules",
        ),  # no folder
    ):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(command), run_name="__main__")
        assert (stopped.value.code or 0) == status
        assert message in "".join(capsys.readouterr())
    for picture in (out / "a.png", tmp_path / "b.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "b.json").read_bytes() == (out / "a.json").read_bytes()
    trace = json.loads(gzip.decompress((tmp_path / "b.json.gz").read_bytes()))["traceEvents"]
    assert [event["name"] for event in trace if event.get("cat") == "exchange"] == [
        f"void {WORK[0].name}(int)"
    ]
    written = json.loads((out / "a.json").read_text())
    assert written["judged"] == {"what": "the exchange in prefetch steps", "hidden_fraction": 0.5}
    assert written["sources"] == ["a.sqlite.gz"]
    assert (written["rows"][0]["range"], written["rows"][0]["hidden_us"]) == ("send-recv", 10)
