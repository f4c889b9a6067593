"""Shrinking: the same report from a small file that says nothing of the machine."""

from __future__ import annotations

import gzip
import json
import sqlite3
from contextlib import closing

import pytest

from overlap_mtp.profiling import ProfileError, read_profile, report_on
from overlap_mtp.profiling.shrink import shrink, without_folders

from handmade import Process, Span, Work, write_kineto, write_nsys

SECRETS = (b"secret-host", b"/home", b"someone", b"TOKEN", b"EXPORT_COMMAND", b"other project")


SPANS = [
    *[Span("step prefetch r0", 0, 50), Span("send-recv r0", 0.5, 1.5, payload=640)],
    *[Span("/home/someone/other project", 0, 60, domain=None), Span("ncclSend", 0.8, 1.2, domain="NCCL")],
]
WORK = [
    *[Work("ncclDevKernel_SendRecv", 1, 20, 40, graph_node=11), Work("gemm", 2, 30, 60, stream=9)],
    *[Work("Memcpy PtoP", 3, 70, 80, num_bytes=64), Work("Memset", 4, 75, 76)],
]
PROCESS = Process(77, SPANS, WORK, nodes=[(1, None, 1.0), (11, 1, 5.0)], extra_calls=[5, 6])


def facts(path):
    return {**report_on([read_profile(path)]).as_json(), "sources": None}


def write(path, form: str, process: Process):
    return write_nsys(path, [process]) if form == "nsys" else write_kineto(path, process, rank=0)


@pytest.mark.parametrize("form", ["nsys", "kineto"])
def test_a_shrunk_profile_gives_the_same_report_and_no_secret(tmp_path, form):
    source, target, again = tmp_path / "full", tmp_path / "new" / "small.gz", tmp_path / "again.gz"
    assert b"someone" in write(source, form, PROCESS).read_bytes()
    shrink(source, target)
    assert facts(target) == facts(source)
    plain = gzip.decompress(target.read_bytes())
    assert not [secret for secret in SECRETS if secret in plain + target.read_bytes()]
    shrink(target, again)  # from a gzipped one, and byte for byte the same
    assert again.read_bytes() == target.read_bytes()
    if form == "kineto":
        assert {"schemaVersion", "traceEvents", "distributedInfo"} == set(json.loads(plain))
        return
    (tmp_path / "small.sqlite").write_bytes(plain)
    with closing(sqlite3.connect(tmp_path / "small.sqlite")) as db:
        calls = db.execute("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_RUNTIME").fetchone()
        texts = {row[0] for row in db.execute("SELECT value FROM StringIds")}
    assert calls == (len(WORK),)
    assert texts == {"step prefetch r0", "send-recv r0", "ncclDevKernel_SendRecv", "gemm"}


@pytest.mark.parametrize("form", ["nsys", "kineto"])
def test_a_shrunk_profile_of_another_project_keeps_its_ranges(tmp_path, form):
    spans = [Span("/home/someone/run.py forward", 0, 60, domain=None)]
    source = write(tmp_path / "full", form, Process(77, spans, WORK))
    shrink(source, tmp_path / "small.gz")
    found = report_on([read_profile(tmp_path / "small.gz")])
    assert {row.range for row in found.rows} == {"run.py forward"}
    assert b"someone" not in gzip.decompress((tmp_path / "small.gz").read_bytes())


def test_what_is_no_profile_is_not_shrunk(tmp_path):
    (tmp_path / "words").write_text("words")
    with pytest.raises(ProfileError, match="not a profile"):
        shrink(tmp_path / "words", tmp_path / "small.gz")
    assert not (tmp_path / "small.gz").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/run.py", "run.py"),
        ("load ~/data/x.bin twice", "load x.bin twice"),
        ("step sync r0", "step sync r0"),
        ("void f<a / b>(int*)", "void f<a / b>(int*)"),
        (None, None),
    ],
)
def test_folders_are_cut_from_texts(text, expected):
    assert without_folders(text) == expected
