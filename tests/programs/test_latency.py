"""Short runs of roll_latency and of soak from the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import roll_latency
import soak

ROOT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, f"experiments/{program}.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_roll_latency(tmp_path):
    sizes = ["--tokens", "64", "--documents", "1,8", "--depths", "1,2", "--rounds", "3"]
    transports = ["--transports", "process_group,pigeon"]
    said = run("roll_latency", "--ranks", "2", *sizes, *transports, "--out", str(tmp_path))
    assert "skipped: pigeon (transport must be one of" in said
    result = json.loads((tmp_path / "roll_latency.json").read_text())
    assert "pigeon" in result["skipped"]
    rows = {
        (one["schedule"], one["depths"], one["documents"]): one
        for one in result["rows"]
        if one["transport"] != "device"
    }
    for schedule in ("sync", "merged", "overlap", "prefetch", "prepared"):
        for depths in (1, 2):
            for documents in (1, 8):
                one = rows[schedule, depths, documents]
                assert one["failed"] is None
                assert one["rounds"] == 3
                assert one["differing_tokens"] == 0
                assert 0 < one["host_us"]["median"] <= one["wall_us"]["median"]
                assert one["wall_us"]["p10"] <= one["wall_us"]["median"] <= one["wall_us"]["p90"]
                assert one["gpu_us"] is None
    # 4 tensors, 2 depths; each of two ranks sends to the other, once a dense document or more often
    assert rows["prefetch", 2, 8]["messages"] == 1
    assert rows["merged", 2, 8]["messages"] == rows["overlap", 2, 8]["messages"] == 2
    assert rows["sync", 2, 1]["messages"] == 8
    assert rows["sync", 2, 8]["messages"] > 32
    assert rows["prepared", 2, 8]["messages"] == 0
    assert rows["prefetch", 2, 1]["bytes"] < rows["prefetch", 2, 8]["bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"roll_latency.json", "roll_latency.png"}
    text = json.dumps(result)
    for secret in (socket.gethostname(), str(Path.home()), str(ROOT)):
        assert secret not in text


def test_soak(tmp_path):
    run("soak", "--exchanges", "40", "--out", str(tmp_path))
    [found] = json.loads((tmp_path / "soak.json").read_text())["runs"]
    assert found["transport"] == "process_group"
    assert found["exchanges"] >= 40
    assert found["wrong_words"] == 0


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (roll_latency, "--schedules sync,fast", "schedules must be among"),
        (roll_latency, "--depths 1,two", "--depths: must be whole numbers above 0"),
        (roll_latency, "--documents 0", "--documents: must be whole numbers above 0"),
        (roll_latency, "--cp-sizes 3", "cp-sizes must divide the number of ranks 2"),
        (roll_latency, "--tokens 64 --documents 100", "documents in [1, 32]"),
        (roll_latency, "--tokens 63 --documents 4", "tokens must be even"),
        (roll_latency, "--ranks 4 --tokens 64 --documents 33", "documents in [1, 32]"),
        (roll_latency, "--rounds 1", "--rounds must be at least 2, got 1"),
        (soak, "--exchanges 0", "--exchanges must be at least 1, got 0"),
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
