"""Capturing and shrinking: the same report from a small file that says nothing of the machine."""

from __future__ import annotations

import glob
import gzip
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from overlap_mtp.profiling import ProfileError, read_profile, report_on
from overlap_mtp.profiling.shrink import shrink, without_folders

from handmade import Process, Span, Work, kineto_document, write_kineto, write_nsys

ROOT = Path(__file__).parents[2]
CAPTURE = ROOT / "profiles" / "capture.sh"
SECRETS = (b"secret-host", b"/home", b"someone", b"TOKEN", b"EXPORT_COMMAND", b"other project")
SPANS = [
    *[Span("step prefetch r0", 0, 50), Span("send-recv r0", 0.5, 1.5, payload=640)],
    *[Span("/home/someone/other project", 0, 60, domain=None), Span("ncclSend", 0.8, 1.2, domain="NCCL")],
]
WORK = [
    *[Work("ncclDevKernel_SendRecv", 1, 20, 40, graph_node=11), Work("gemm", 2, 30, 60, stream=9)],
    *[Work("Memcpy PtoP", 3, 70, 80, num_bytes=64), Work("Memset", 4, 75, 76)],
]
PROCESS = Process(77, SPANS, WORK, nodes=[(1, None, 1.0), (11, 1, 5.0)], extra_calls=[(5, 1), (6, 1)])


def facts(path: Path) -> dict[str, object]:
    return {**report_on([read_profile(path)]).as_json(), "sources": None}


@pytest.mark.parametrize("form", ["nsys", "kineto"])
def test_a_shrunk_profile_gives_the_same_report_and_no_secret(tmp_path, form):
    source = (
        write_nsys(tmp_path / "full.sqlite", [PROCESS])
        if form == "nsys"
        else write_kineto(tmp_path / "full.json", PROCESS, rank=0)
    )
    assert b"someone" in source.read_bytes()
    target = tmp_path / "new" / "small.gz"
    shrink(source, target)
    assert facts(target) == facts(source)
    plain = gzip.decompress(target.read_bytes())
    for secret in SECRETS:
        assert secret not in plain, secret
        assert secret not in target.read_bytes(), secret
    again = tmp_path / "again.gz"
    shrink(target, again)  # from a packed one, and byte for byte
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
    process = Process(77, [Span("/home/someone/run.py forward", 0, 60, domain=None)], WORK)
    write = write_nsys if form == "nsys" else write_kineto
    source = write(tmp_path / "full", [process] if form == "nsys" else process)
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


def capture(tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)}
    command = ["bash", str(CAPTURE), *map(str, arguments)]
    return subprocess.run(
        command, cwd=tmp_path, env=variables | environment, capture_output=True, text=True, timeout=120
    )


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + body)
    path.chmod(0o755)
    return path


FAKE_NSYS = """
echo "$@" >> "{log}"
[[ $1 == --version ]] && exit {version_status}
while [[ $1 != -o ]]; do command=${{command:-$1}}; shift; done
[[ $command == profile ]] && touch "$2.nsys-rep"
[[ $command == export ]] && cp "{profile}" "$2"
exit 0
"""


def test_capture_with_nsys(tmp_path):
    profile = write_nsys(tmp_path / "full.sqlite", [PROCESS])
    fake = FAKE_NSYS.format(log=tmp_path / "log", profile=profile, version_status=0)
    script(tmp_path / "bin" / "nsys", fake)
    name = f"test-{os.getpid()}"
    done = capture(tmp_path, f"{name}.sqlite.gz", "--preset", "h4096", "--rounds", "2")
    report = ROOT / "out" / "profiles" / f"{name}.nsys-rep"
    assert report.exists()
    report.unlink()
    assert done.returncode == 0, done.stderr
    assert facts(tmp_path / f"{name}.sqlite.gz") == facts(profile)
    _, profiled, exported = (tmp_path / "log").read_text().splitlines()
    assert "--capture-range=cudaProfilerApi" in profiled
    assert "--cuda-graph-trace=node" in profiled
    assert "experiments/compare_modes.py" in profiled
    assert "--profile nsys" in profiled
    assert profiled.endswith("--preset h4096 --rounds 2")
    assert exported.startswith("export --type sqlite")


def test_capture_with_an_nsys_that_does_not_start(tmp_path):
    nsys = script(tmp_path / "somewhere", FAKE_NSYS.format(log="/dev/null", profile="", version_status=1))
    done = capture(tmp_path, "a.sqlite.gz", NSYS=str(nsys))
    assert done.returncode == 2
    assert "libdw1" in done.stderr


@pytest.mark.skipif(
    any(glob.glob(f"{place}/**/nsys", recursive=True) for place in ("/opt/nvidia", "/usr/local/cuda*/bin"))
    or any(Path(place, "nsys").exists() for place in ("/usr/bin", "/bin")),
    reason="this machine has nsys",
)
def test_capture_without_nsys_says_what_to_install(tmp_path):
    done = capture(tmp_path, "a.sqlite.gz")
    assert done.returncode == 2
    assert "install the package nsight-systems-cli" in done.stderr
    assert "--torch-profiler" in done.stderr


def test_capture_with_the_profiler_of_torch(tmp_path):
    """A Python that writes the traces which compare_modes would, and is Python for all else."""
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps(kineto_document(PROCESS, 0)).encode()))
    python = script(
        tmp_path / "bin" / "python",
        f"""
if [[ $1 != experiments/compare_modes.py ]]; then exec "{sys.executable}" "$@"; fi
echo "$@" > "{tmp_path / "log"}"
while [[ $1 != --profile-out ]]; do shift; done
cp "{trace}" "$2/rank0.json.gz"
""",
    )
    done = capture(tmp_path, "--torch-profiler", "a.sqlite.gz", "--rounds", "2", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert "--profile torch" in (tmp_path / "log").read_text()
    assert facts(tmp_path / "a" / "rank0.json.gz") == facts(trace)


def test_capture_without_arguments_shows_how(tmp_path):
    done = capture(tmp_path)
    assert done.returncode == 2
    assert "profiles/capture.sh OUT.sqlite.gz" in done.stderr
    assert capture(tmp_path, "--help").returncode == 0
