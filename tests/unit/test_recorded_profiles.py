"""The profiles recorded in profiles/: what must hold for each of them."""

import gzip
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest

from overlap_mtp.profiling import Report, nsys, read_profile, report_on

ROOT = Path(__file__).parents[2]
EXPORTS = sorted((ROOT / "profiles").glob("*.sqlite.gz"))
MEGATRON = ROOT / "profiles/megatron-32-documents.sqlite.gz"
MIXING = ROOT / "profiles/mixing-32-documents.sqlite.gz"
COMPARISONS = [path for path in EXPORTS if path not in (MEGATRON, MIXING)]
ROW_SHARES = {  # hidden; on the worst rank; in forward; in backward
    "overlap:symmetric": [0.948, 0.915, 0.957, 0.933],
    "overlap:process_group": [0.946, 0.891, 0.954, 0.936],
}
READ = {*nsys.TABLES.values(), nsys.CALLS, nsys.RANGES, nsys.NODES, "StringIds", "META_DATA_EXPORT"}


@cache
def report(path: Path) -> Report:
    return report_on([read_profile(path)])


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_a_recorded_profile_adds_up(path):
    found = report(path)
    devices = [one.label for one in found.timelines]
    assert devices == [f"rank {rank}" for rank in range(len(devices))]
    assert len(devices) > 1
    for row in found.rows:
        assert row.launches > 0
        assert row.time_us > 0
        assert row.peer_wait_us is None or row.peer_wait_us >= 0
        if row.kind != "local":
            assert row.hidden_us + row.exposed_us == pytest.approx(row.time_us)
            assert 0 <= row.hidden_fraction <= 1
    kinds = [{(row.schedule, row.kind) for row in found.rows if row.device == device} for device in devices]
    assert all(kind == kinds[0] for kind in kinds)
    assert all(one.step_ms > 0 for one in found.schedules if one.steps)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_a_comparison_shows_what_it_was_recorded_for(path):
    found = report(path)
    assert found.notes == ()
    schedules = {one.name: one for one in found.schedules}
    assert schedules["prepared"].exchange_hidden is None
    assert schedules["prefetch"].exchange_hidden > 0.5 > 0.1 > schedules["sync"].exchange_hidden
    sends = [row for row in found.rows if row.range == "send-recv"]
    launches = {name: sum(row.launches for row in sends if row.schedule == name) for name in schedules}
    assert launches["sync"] > launches["prefetch"] > 0


def test_megatrons_step_is_beside_that_of_the_drop_in():
    """With the figures that profiles/README.md states."""
    found = report(MEGATRON)
    assert found.notes == ("No overlap efficiency: it needs steps of sync and of prepared.",)
    dropin, own = found.schedules
    assert (own.name, own.steps, dropin.name, dropin.steps) == ("megatron", 1, "dropin", 8)
    assert len(found.timelines) == 4
    assert (round(own.step_ms), round(dropin.step_ms)) == (752, 180)
    assert own.exchange_hidden == 0
    shares = dropin.exchange_hidden, dropin.exchange_worst, dropin.exchange_least
    assert [round(share, 3) for share in shares] == [0.960, 0.957, 0.912]
    sends = [row for row in found.rows if row.kind == "exchange"]
    assert {row.launches for row in sends if row.schedule == "dropin"} == {2 * 8}
    own_sends = [row for row in sends if row.schedule == "megatron"]
    assert {row.launches for row in own_sends} == {7200, 7712}
    times_ms = [row.time_us / 1000 for row in own_sends]
    assert (round(min(times_ms)), round(max(times_ms))) == (88, 358)


def test_rows_of_hidden_states_travel_under_compute():
    """With the figures that profiles/README.md states."""
    found = report(MIXING)
    schedules = {one.name: one for one in found.schedules}
    assert {name: one.steps for name, one in schedules.items()} == dict.fromkeys(ROW_SHARES, 8) | {
        "merged": 8,
        "none": 8,
    }
    assert schedules["merged"].exchange_hidden == 0
    for name, stated in ROW_SHARES.items():
        ways = []
        for is_backward in (False, True):
            times = [
                (row.hidden_us, row.time_us)
                for row in found.rows
                if (row.schedule, row.kind) == (name, "exchange")
                and row.range.endswith("in backward") is is_backward
            ]
            hidden, time = map(sum, zip(*times, strict=True))
            ways.append(hidden / time)
        shares = schedules[name].exchange_hidden, schedules[name].exchange_worst, *ways
        assert [round(share, 3) for share in shares] == stated


@pytest.mark.parametrize(("gpus", "steps"), [(2, 52), (4, 26)])
def test_the_page_states_the_hidden_shares_of_the_reports(gpus, steps):
    """Time of an exchange, what is uncovered, the share, that of the worst rank, the mean of steps, a tenth of them."""
    report = json.loads((ROOT / f"profiles/hidden-{gpus}gpus.json").read_text())
    page = (ROOT / "profiles/README.md").read_text()
    for transport, name in (("prefetch:symmetric", "symmetric memory"), ("prefetch:process_group", "NCCL")):
        (found,) = (one for one in report["schedules"] if one["name"] == transport)
        rows = [r for r in report["rows"] if (r["schedule"], r["kind"]) == (transport, "exchange")]
        assert found["steps"] == steps
        time_us, hidden_us = (
            sum(r[column] for r in rows) / steps / gpus for column in ("time_us", "hidden_us")
        )
        keys = ("exchange_hidden", "exchange_worst", "exchange_mean")
        shares = [f"{100 * found[key]:.1f} %" if key in found else "" for key in keys]
        cells = [
            f"{time_us:.0f}",
            f"{time_us - hidden_us:.1f}",
            *shares,
            f"{100 * found['exchange_p10']:.0f} %",
        ]
        stated = re.search(rf"^\| {name}, 2 GPUs \|.*\n?(\| \.\.\. 4 GPUs \|.*)?", page, re.MULTILINE)
        line = stated[0].splitlines()[gpus // 4]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_a_recorded_export_holds_only_what_is_read(path):
    with closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(gzip.decompress(path.read_bytes()))
        assert {row[0] for row in db.execute("SELECT name FROM sqlite_master")} <= READ
        metadata = db.execute("SELECT name FROM META_DATA_EXPORT").fetchall()
        texts = [row[0] for row in db.execute("SELECT value FROM StringIds")]
    assert metadata == [("EXPORT_SCHEMA_VERSION",)]
    assert not [text for text in texts if re.search(r"\w/\w", text)]


BLOCKED = """
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "nvtx", "scipy", "tyro", "typer"}:
            raise ImportError(f"a reader of profiles has no {name}")

sys.meta_path.insert(0, Blocked())
del sys.argv[0]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "path", sorted(EXPORTS, key=lambda path: path.stat().st_size)[:1], ids=lambda path: path.name
)
def test_a_profile_is_read_without_torch(tmp_path, path):
    """And the same is told as with it: by the tables, the JSON, the trace and the picture."""
    outputs = ["--json", "a.json", "--plot", "a.png", "--perfetto", "a.json.gz"]
    command = [sys.executable, "-I", "-c", BLOCKED, ROOT, ROOT / "profiles/report.py", path, *outputs]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = report(path)
    assert json.loads((tmp_path / "a.json").read_text()) == found.as_json()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes()))["traceEvents"]
    profile = found.timelines[0].profile
    kinds = Counter(event["cat"] == "range" for event in events if event["ph"] == "X")
    assert kinds == {True: profile.ranges.start.size, False: profile.activities.start.size}
    for one in found.schedules:
        assert re.search(rf"^{one.name} +{one.steps} +{one.step_ms:.3f} ", done.stdout, re.MULTILINE)
