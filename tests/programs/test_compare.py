"""Short runs of compare_modes and of sweep from the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import compare_modes
import pytest
import sweep

ROOT = Path(__file__).parents[2]
SCHEDULES = ["sync", "merged", "overlap", "prefetch", "prepared"]


def run(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, f"experiments/{program}.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("documents", ["dense", "packed"])
def test_compare_modes(tmp_path, documents):
    sizes = ["--seq-len", "128", "--hidden-size", "32", "--ffn-size", "32", "--num-layers", "1"]
    rounds = ["--ranks", "2", "--rounds", "3", "--warmup", "1", "--out", str(tmp_path)]
    run("compare_modes", *rounds, "--documents", documents, "--num-documents", "3", *sizes)
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
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "step_time.png", "step_delta.png"}
    text = json.dumps(result)
    for secret in (socket.gethostname(), str(Path.home()), str(ROOT)):
        assert secret not in text


def test_sweep(tmp_path):
    some = ["--presets", "tiny", "--documents", "dense,4", "--directions", "train", "--modes", "prefetch"]
    said = run("sweep", *some, "--rounds", "2", "--warmup", "1", "--out", str(tmp_path))
    assert "4 documents, forward + backward" in said
    for name, documents in (("tiny-dense-train", None), ("tiny-4-train", 4)):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["settings"]["num_documents"] == documents
        assert list(record["rows"]) == ["prefetch", "prepared"]
        assert (tmp_path / f"{name}-step_delta.png").exists()
        assert f"| {name} | prefetch |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (compare_modes, "--modes sync,fast", "modes must be among"),
        (compare_modes, "--preset huge", "preset must be one of tiny, small, h2048, h4096"),
        (compare_modes, "--seq-len 130", "next legal length is 132"),
        (compare_modes, "--data no-such-file.txt", "no-such-file.txt does not exist"),
        (compare_modes, "--documents packed --num-documents 500", "num_documents must be in"),
        (compare_modes, "--num-heads 3", "hidden_size must be a multiple of"),
        (compare_modes, "--vocab-size 50", "is outside the vocabulary"),
        (compare_modes, "--rounds 1", "--rounds must be at least 2, got 1"),
        (compare_modes, "--ranks 0", "--ranks must be at least 1, got 0"),
        (compare_modes, "--transport pigeon", "transport must be one of"),
        (compare_modes, "--graph", "need GPUs"),
        (compare_modes, "--layout round", "invalid choice 'round'"),
        (sweep, "--presets tiny --documents many", "documents must be `dense` or whole numbers"),
        (sweep, "--presets tiny --directions back", "directions must be among train, forward"),
        (sweep, "--presets tiny --documents 500", "num_documents must be in"),
    ],
)
def test_bad_arguments_are_said_before_ranks_start(program, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(program, "run_on_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(sys, "argv", ["program", "--device", "cpu", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said, said
