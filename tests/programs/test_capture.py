"""Recording with capture.sh; scripts stand in for Nsight Systems and for the run that it profiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

from overlap_mtp.profiling import read_profile, report_on

from comparison_records import record_of
from handmade import Process, Span, Work, write_kineto, write_nsys

ROOT = Path(__file__).parents[2]
PROCESS = Process(77, [Span("send-recv r0", 0, 9)], [Work("put", 1, 20, 40), Work("gemm", 10, 30, 60, 9)])
HAS_NSYS = [*Path("/opt/nvidia").rglob("nsys"), *Path("/usr").glob("local/cuda*/bin/nsys")]
HAS_NSYS += Path("/usr/bin").glob("nsys")
NSYS = """
echo "$@" >> "{folder}/log"
while [[ $1 != -o ]]; do command=${{command:-$1}}; shift || exit 0; done
[[ $command == profile ]] && touch "$2.nsys-rep"
[[ $command == export ]] && cp "{folder}/full" "$2"
exit 0
"""
PYTHON = f"""
if [[ $1 != experiments/compare_modes.py ]]; then exec "{sys.executable}" "$@"; fi
echo "$@" > "{{folder}}/log"
while [[ $1 != --out ]]; do shift; done
mkdir -p "$2" && cp "{{folder}}/results.json" "$2"
while [[ $1 != --profile-out ]]; do shift; done
gzip < "{{folder}}/full" > "$2/rank0.json.gz"
"""


def capture(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(folder)}
    command = ["bash", str(ROOT / "profiles" / "capture.sh"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, text=True, timeout=120
    )


def script(path: Path, body: str) -> str:
    path.write_text("#!/bin/bash\n" + body.format(folder=path.parent))
    path.chmod(0o755)
    return str(path)


def rows(path: Path) -> tuple:
    return report_on([read_profile(path)]).rows


def test_capture_with_nsys(tmp_path):
    write_nsys(tmp_path / "full", [PROCESS])
    script(tmp_path / "nsys", NSYS)
    name = f"test-{os.getpid()}"
    done = capture(tmp_path, f"{name}.sqlite.gz", "--preset", "h4096", "--rounds", "2")
    (ROOT / "out" / "profiles" / f"{name}.nsys-rep").unlink()  # fails if it was not kept
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / f"{name}.sqlite.gz") == rows(tmp_path / "full")
    _, profiled, exported = (tmp_path / "log").read_text().splitlines()
    assert "--capture-range=cudaProfilerApi" in profiled
    assert "--cuda-graph-trace=node" in profiled
    assert "experiments/compare_modes.py" in profiled
    assert "--profile nsys" in profiled
    assert profiled.endswith("--preset h4096 --rounds 2")
    assert exported.startswith("export --type sqlite")


def test_capture_with_the_profiler_of_torch(tmp_path):
    write_kineto(tmp_path / "full", PROCESS, 0)
    python = script(tmp_path / "python", PYTHON)
    record = record_of({"sync": (1.5, 1.4, 1.6)})
    record["command"] = "python experiments/compare_modes.py --profile torch --rounds 2"
    (tmp_path / "results.json").write_text(json.dumps(record))
    (tmp_path / "a").mkdir()
    for name in ("rank0.json.gz", "rank9.json.gz", "rank9.json"):
        (tmp_path / "a" / name).write_text("of an earlier run, and no profile")
    done = capture(tmp_path, "--torch-profiler", "a.sqlite.gz", "--rounds", "2", PYTHON=python)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Timeline of a profile" in page
    assert "A profiler recorded these steps" in page
    assert "--profile torch" in (tmp_path / "log").read_text()
    assert rows(tmp_path / "a" / "rank0.json.gz") == rows(tmp_path / "full")
    kept = {path.name for path in (tmp_path / "a").iterdir()}
    assert kept == {"rank0.json.gz", "rank9.json", "report.html"}


def test_a_capture_without_a_trace_leaves_those_of_an_earlier_run(tmp_path):
    python = script(tmp_path / "python", "exit 0")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/rank9.json.gz").write_text("of an earlier run")
    done = capture(tmp_path, "--torch-profiler", "a", PYTHON=python)
    assert done.returncode == 2
    assert "wrote no trace" in done.stderr
    assert (tmp_path / "a/rank9.json.gz").exists()


def test_capture_says_what_is_missing(tmp_path):
    done = capture(tmp_path)
    assert done.returncode == 2
    assert "profiles/capture.sh OUT.sqlite.gz" in done.stderr
    assert capture(tmp_path, "--help").returncode == 0
    done = capture(tmp_path, "a.sqlite.gz", NSYS=script(tmp_path / "broken", "exit 1"))
    assert done.returncode == 2
    assert "libdw1" in done.stderr
    if not HAS_NSYS:
        done = capture(tmp_path, "a.sqlite.gz")
        assert done.returncode == 2
        assert "install the package nsight-systems-cli" in done.stderr
        assert "--torch-profiler" in done.stderr
