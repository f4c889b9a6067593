"""Shrinking: the same report from a small file that says nothing of the machine."""

import gzip
import json
import sqlite3
from contextlib import closing

import pytest

from overlap_mtp.profiling import ProfileError, Report, read_profile, report_on
from overlap_mtp.profiling.shrink import shrink, without_folders

from handmade import Process, Span, Work, write_kineto, write_nsys

SECRETS = (b"secret-host", b"/home", b"someone", b"TOKEN", b"EXPORT_COMMAND", b"other project")
STEP = [Span("step prefetch r0", 0, 50), Span("send-recv r0", 0.5, 1.5, payload=640)]
FOREIGN = Span("/home/someone/run.py of other project", 0, 60, domain=None)
WORK = [
    *[Work("ncclDevKernel_SendRecv", 1, 20, 40, graph_node=11), Work("gemm", 2, 30, 60, stream=9)],
    *[Work("Memcpy PtoP", 3, 70, 80, num_bytes=64), Work("Memset", 4, 75, 76)],
]


def shrunk(folder, form: str, *spans: Span) -> tuple[bytes, Report]:
    """Shrink a profile, and return what is left and the report on it."""
    source, target = folder / "full", folder / "new" / "small.gz"
    process = Process(77, spans, WORK, nodes=[(1, None, 1.0), (11, 1, 5.0)], extra_calls=[5, 6])
    write_nsys(source, [process]) if form == "nsys" else write_kineto(source, process, rank=0)
    assert b"someone" in source.read_bytes()
    shrink(source, target)
    return gzip.decompress(target.read_bytes()), report_on([read_profile(target)])


@pytest.mark.parametrize("form", ["nsys", "kineto"])
def test_a_shrunk_profile_gives_the_same_report_and_no_secret(tmp_path, form):
    plain, found = shrunk(tmp_path, form, *STEP, FOREIGN, Span("ncclSend", 0.8, 1.2, domain="NCCL"))
    full = report_on([read_profile(tmp_path / "full")])
    target, again = tmp_path / "new" / "small.gz", tmp_path / "again.gz"
    shrink(target, again)  # from a gzipped one, and byte for byte the same
    assert again.read_bytes() == target.read_bytes()
    assert {**found.as_json(), "sources": ["full"]} == full.as_json()
    assert not [secret for secret in SECRETS if secret in plain + again.read_bytes()]
    if form == "kineto":
        assert {"schemaVersion", "traceEvents", "distributedInfo"} == set(json.loads(plain))
        return
    with closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(plain)
        calls = db.execute("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_RUNTIME").fetchone()
        texts = {row[0] for row in db.execute("SELECT value FROM StringIds")}
    assert calls == (len(WORK),)
    assert texts == {"step prefetch r0", "send-recv r0", "void ncclDevKernel_SendRecv(int)", "void gemm(int)"}


@pytest.mark.parametrize("form", ["nsys", "kineto"])
def test_a_shrunk_profile_of_another_project_keeps_its_ranges(tmp_path, form):
    plain, found = shrunk(tmp_path, form, FOREIGN)
    assert {row.range for row in found.rows} == {"run.py of other project"}
    assert b"someone" not in plain


def test_a_shrunk_profile_still_says_that_events_are_missing(tmp_path):
    lost = "Not all CUDA events might have been collected: see /home/someone/log."
    said = [lost, "Process 7 of secret-host was launched by someone.", "Number of CUDA events collected: 9."]
    source, target = tmp_path / "full", tmp_path / "small.gz"
    shrink(write_nsys(source, [Process(77, STEP, WORK)], said=said), target)
    plain = gzip.decompress(target.read_bytes())
    assert not [secret for secret in (*SECRETS, b"Number of CUDA events") if secret in plain]
    words = (
        "Nsight Systems says that events are missing: Not all CUDA events might have been collected: see log."
    )
    assert read_profile(target).notes == [f"small.gz: {words}"]


def test_what_is_no_profile_is_not_shrunk(tmp_path):
    (tmp_path / "words").write_text("words")
    with pytest.raises(ProfileError, match="not a profile"):
        shrink(tmp_path / "words", tmp_path / "small.gz")
    assert not (tmp_path / "small.gz").exists()


def test_folders_are_cut_from_texts():
    assert without_folders("/home/me/run.py") == "run.py"
    assert without_folders("load ~/data/x.bin twice") == "load x.bin twice"
    for text in ("step sync r0", "void f<a / b>(int*)", None):
        assert without_folders(text) == text
