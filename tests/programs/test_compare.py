"""The main job: its statistics on known numbers, and a short run of it from the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import compare_modes
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from harness import statistics

ROOT = Path(__file__).parents[2]

SCHEDULES = ["sync", "merged", "overlap", "prefetch", "prepared"]


def test_comparison_finds_known_differences():
    rng = np.random.default_rng(0)
    shared = rng.normal(100, 10, 200)  # drifts of the machine that hit a whole round
    times = {
        "prepared": shared,
        "sync": shared + 2 + rng.normal(0, 0.1, 200),
        "prefetch": shared + 0.1 + rng.normal(0, 0.1, 200),
    }
    compared = statistics.compare(times, "prepared", "sync")
    sync, prefetch = compared["sync"], compared["prefetch"]
    assert sync.step_delta_us.low < 2000 < sync.step_delta_us.high
    assert prefetch.step_delta_us.low < 100 < prefetch.step_delta_us.high
    assert sync.step_delta_us.high - sync.step_delta_us.low < 100  # the pairing removes the drifts
    assert sync.ratio.value == pytest.approx(1.02, abs=0.002)
    assert sync.ratio.low < sync.ratio.value < sync.ratio.high
    assert prefetch.efficiency is not None
    assert prefetch.efficiency.value == pytest.approx(0.95, abs=0.02)
    assert prefetch.efficiency.low < 0.95 < prefetch.efficiency.high
    assert compared["prepared"].step_delta_us.value == 0


def test_a_worse_schedule_has_negative_efficiency():
    base = np.full(20, 10.0)
    compared = statistics.compare(
        {"prepared": base, "sync": base + 1, "overlap": base + 3}, "prepared", "sync"
    )
    assert compared["overlap"].efficiency is not None
    assert compared["overlap"].efficiency.value == pytest.approx(-2)


def test_there_is_no_efficiency_where_sync_exposes_no_more_than_noise():
    rng = np.random.default_rng(0)
    base = rng.normal(100, 1, 60)
    times = {
        "prepared": base,
        "sync": base + rng.normal(0.01, 1, 60),
        "prefetch": base + rng.normal(0, 1, 60),
    }
    assert statistics.compare(times, "prepared", "sync")["prefetch"].efficiency is None


def run_compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "experiments/compare_modes.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_compare_modes_end_to_end(tmp_path, documents):
    sizes = ["--seq-len", "128", "--hidden-size", "32", "--ffn-size", "32", "--num-layers", "1"]
    done = run_compare(
        *["--device", "cpu", "--ranks", "2", "--rounds", "3", "--warmup", "1", "--out", str(tmp_path)],
        *["--documents", documents, "--num-documents", "3", *sizes],
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    rows = result["rows"]
    assert list(rows) == [*SCHEDULES, "none"]
    for schedule in SCHEDULES:
        assert rows[schedule]["rolls_equal"], schedule
        assert rows[schedule]["loss_equal"], schedule
        assert rows[schedule]["loss"] == rows["prepared"]["loss"] > 0
        assert len(result["times_ms"][schedule]) == 3
    assert not rows["none"]["rolls_equal"]
    # 2 ranks, 4 tensors, 2 depths: each rank sends to the other.
    assert rows["prefetch"]["messages_per_step"] == 2
    assert rows["merged"]["messages_per_step"] == rows["overlap"]["messages_per_step"] == 4
    assert rows["prepared"]["messages_per_step"] == 0
    assert rows["sync"]["messages_per_step"] >= 16
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "step_time.png", "exposed.png"}
    text = json.dumps(result)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "sync,fast"], "modes must be among"),
        (["--preset", "huge"], "preset must be one of tiny, small, h2048, h4096"),
        (["--seq-len", "130"], "next legal length is 132"),
        (["--data", "no-such-file.txt"], "no-such-file.txt does not exist"),
        (["--documents", "packed", "--num-documents", "500"], "num_documents must be in"),
        (["--num-heads", "3"], "hidden_size must be a multiple of"),
        (["--vocab-size", "50"], "is outside the vocabulary"),
    ],
)
def test_bad_arguments_are_said_before_ranks_start(arguments, message, monkeypatch):
    monkeypatch.setattr(compare_modes, "run_on_ranks", lambda *_: pytest.fail("ranks were started"))
    app = typer.Typer()
    app.command()(compare_modes.main)
    done = CliRunner().invoke(app, ["--device", "cpu", *arguments])
    assert done.exit_code == 2
    said = " ".join(done.output.replace("│", " ").split())
    assert message in said, said
