"""Short runs of the experiments from the command line, on CPU ranks."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import compare_modes
import golden
import numpy as np
import parity
import pytest
import roll_latency
import scaling_model
import soak
import sweep
import train

from compare.page import page_of
from compare.sentence import sentence_of
from soaks.load import CASES, LOADS, make_layout

ROOT = Path(__file__).parents[2]
SCHEDULES = ["sync", "merged", "batched", "overlap", "prefetch", "prepared"]


def run(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONWARNINGS"] = "error::RuntimeWarning"
    command = [sys.executable, f"experiments/{program}.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_record(path: Path) -> dict:
    text = path.read_text()
    for secret in (socket.gethostname(), str(Path.home()), str(ROOT)):
        assert secret not in text
    return json.loads(text)


@pytest.mark.parametrize("documents", [0, 3])
def test_compare_modes(tmp_path, documents):
    rounds = ["--ranks", "2", "--rounds", "3", "--warmup", "1", "--out", str(tmp_path)]
    sizes = ["--seq-len", "128", "--documents", str(documents)]
    said = run("compare_modes", *rounds, *sizes)
    result = read_record(tmp_path / "results.json")
    rows = result["rows"]
    assert list(rows) == [*SCHEDULES, "none"]
    for schedule in SCHEDULES:
        assert rows[schedule]["rolls_equal"], schedule
        assert rows[schedule]["loss_equal"], schedule
        assert rows[schedule]["gradients_equal"], schedule
        assert rows[schedule]["loss"] == rows["prepared"]["loss"] > 0
        assert len(result["times_ms"][schedule]) == 3
    assert not rows["none"]["rolls_equal"]
    # 2 ranks, 4 tensors, 2 depths: each rank sends to the other.
    assert rows["batched"]["messages_per_step"] == rows["prefetch"]["messages_per_step"] == 2
    assert rows["merged"]["messages_per_step"] == rows["overlap"]["messages_per_step"] == 4
    assert rows["prepared"]["messages_per_step"] == 0
    assert rows["sync"]["messages_per_step"] >= 16
    command = f"python experiments/compare_modes.py --device cpu {' '.join(rounds[:-1])} {tmp_path.name} "
    assert result["command"] == command + " ".join(sizes)
    lines = said.splitlines()
    assert lines[-1] == sentence_of(result)
    assert lines[-1].endswith("all schedules computed the same bits.")
    assert any(line.split()[::2] == ["prepared", "1", "0"] for line in lines)
    pictures = {"step_time.png", "step_delta.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", *pictures}
    assert (tmp_path / "report.html").read_text() == page_of(result)


def test_compare_modes_of_activations(tmp_path):
    rounds = ["--ranks", "2", "--rounds", "6", "--warmup", "1", "--out", str(tmp_path)]
    sizes = ["--seq-len", "64", "--documents", "3", "--modes", "sync,overlap"]
    uses = ["--mtp-inputs", "embeddings", "--hidden-state-mixing", "--distillation", "kl"]
    said = run("compare_modes", *rounds, *sizes, *uses)
    result = read_record(tmp_path / "results.json")
    rows = result["rows"]
    assert list(rows) == ["sync", "overlap", "none", "merged"]
    for schedule in ("sync", "overlap", "merged"):
        assert rows[schedule]["rolls_equal"], schedule
        assert rows[schedule]["loss_equal"], schedule
        assert rows[schedule]["backward_host_us"] > 0
        assert rows[schedule]["exchanges_per_step"] == 3
    assert not rows["none"]["rolls_equal"]
    assert rows["none"]["ratio"]["value"] == 1
    # 2 ranks: embeddings, hidden states and the teacher's states leave, and gradients of the first two come back.
    assert rows["overlap"]["messages_per_step"] == 2 * (3 + 2)
    # Embeddings and the teacher's states travel for two depths, hidden states for one.
    assert rows["merged"]["messages_per_step"] == 2 * (2 + 1 + 2 + 2 + 1)
    assert rows["none"]["messages_per_step"] == 0
    last = said.splitlines()[-1]
    assert last == sentence_of(result)
    assert "sync" in last
    assert last.endswith("all schedules computed the same bits.")
    page = page_of(result)
    assert "embeddings, mixed hidden states, kl distillation" in page
    assert "compared with those that merged gives" in page
    assert "is that of none, whose rolls send nothing and are wrong" in page


def test_sweep(tmp_path):
    some = ["--presets", "tiny", "--documents", "0,4", "--directions", "train", "--modes", "prefetch"]
    said = run("sweep", *some, "--rounds", "2", "--warmup", "1", "--out", str(tmp_path))
    assert "4 documents, forward + backward" in said
    for name, documents in (("tiny-dense-train", None), ("tiny-4-train", 4)):
        record = read_record(tmp_path / f"{name}.json")
        assert record["settings"]["num_documents"] == documents
        assert list(record["rows"]) == ["prefetch", "prepared"]
        assert (tmp_path / f"{name}-step_delta.png").exists()
        assert (tmp_path / f"{name}-report.html").read_text() == page_of(record)
        assert f"| {name} | prefetch |" in (tmp_path / "summary.md").read_text()


def test_roll_latency(tmp_path):
    sizes = ["--seq-len", "128", "--documents", "0,8", "--depths", "1,2", "--rounds", "3"]
    said = run("roll_latency", "--ranks", "2", *sizes, "--out", str(tmp_path))
    result = read_record(tmp_path / "roll_latency.json")
    assert (result["megatron_core"] is None) == ("skipped: megatron" in said)
    assert {one["transport"] for one in result["rows"]} <= {"", "process_group", "host", "device"}
    rows = {
        (one["schedule"], one["depths"], one["documents"]): one
        for one in result["rows"]
        if one["transport"] != "device"
    }
    for schedule in SCHEDULES:
        for depths in (1, 2):
            for documents in (0, 8):
                one = rows[schedule, depths, documents]
                assert (one["differing_tokens"], one["gpu_us"]) == (0, None)
                assert 0 < one["host_us"]["median"] <= one["wall_us"]["median"]
                assert one["cold_us"]["median"] > 0
                assert one["wall_us"]["low"] <= one["wall_us"]["median"] <= one["wall_us"]["high"]
    # 4 tensors, 2 depths; each of two ranks sends to the other, once a dense document or more often
    assert rows["batched", 2, 8]["messages"] == rows["prefetch", 2, 8]["messages"] == 1
    assert rows["merged", 2, 8]["messages"] == rows["overlap", 2, 8]["messages"] == 2
    assert rows["sync", 2, 0]["messages"] == 8
    assert rows["sync", 2, 8]["messages"] > 32
    assert rows["prepared", 2, 8]["messages"] == 0
    assert rows["prefetch", 2, 0]["bytes"] < rows["prefetch", 2, 8]["bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"roll_latency.json", "roll_latency.png"}


@pytest.mark.parametrize("load", LOADS)
def test_soak_needs_tokens_of_peers(load):
    for ranks in (2, 4):
        crossing = 0
        for seed in range(CASES):
            layout = make_layout(load, random.Random(seed), ranks, 512)
            for rank in range(ranks):
                positions = layout.positions(rank)
                crossing += (layout.valid(rank, 1) & ~np.isin(positions + 1, positions)).sum()
        assert crossing > CASES * (ranks - 1) // 2


def test_soak(tmp_path):
    run("soak", "--exchanges", "40", "--activations", "30", "--out", str(tmp_path))
    tokens, activations = read_record(tmp_path / "soak.json")["runs"]
    assert (tokens["carries"], activations["carries"]) == ("tokens", "activations")
    for found, exchanges in ((tokens, 40), (activations, 30)):
        assert found["transport"] == "process_group"
        assert found["exchanges"] >= exchanges
        assert found["wrong_words"] == 0


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (compare_modes, "--modes sync,fast", "modes must be among"),
        (compare_modes, "--preset huge", "preset must be one of tiny, small, h2048, h4096"),
        (compare_modes, "--seq-len 130 --documents 0", "next legal length is 132"),
        (compare_modes, "--data no-such-file.txt", "no-such-file.txt does not exist"),
        (compare_modes, "--documents 500", "num_documents (--documents) must be in [1, 127]"),
        (compare_modes, "--documents -1", "--documents must be at least 0, got -1"),
        (compare_modes, "--documents dense", "Error parsing --documents"),
        (
            compare_modes,
            "--distillation tv --modes prefetch",
            "modes must be among sync, merged, overlap, none, each alone",
        ),
        (compare_modes, "--modes prepared", "modes must name a schedule to compare with prepared"),
        (compare_modes, "--rounds 1", "--rounds must be at least 2, got 1"),
        (compare_modes, "--ranks 0", "--ranks must be at least 1, got 0"),
        (compare_modes, "--modes overlap:pigeon", "modes must be among"),
        (compare_modes, "--modes overlap:symmetric", "need GPUs"),
        (compare_modes, "--graph", "need GPUs"),
        (compare_modes, "--layout round", "invalid choice 'round'"),
        (sweep, "--presets tiny --documents dense", "--documents: must be whole numbers of at least 0"),
        (sweep, "--presets tiny --directions back", "directions must be among train, forward"),
        (sweep, "--presets tiny --documents 500", "num_documents (--documents) must be in [1, 127]"),
        (
            sweep,
            "--profile nsys --documents 0,4,8",
            "--profile nsys records one comparison, got 3: give one value",
        ),
        (sweep, "--profile nsys --documents 0", "--profile and modes over :symmetric need GPUs"),
        (roll_latency, "--modes sync,fast", "modes must be among"),
        (roll_latency, "--depths 1,two", "--depths: must be whole numbers of at least 1"),
        (roll_latency, "--documents 1.5", "--documents: must be whole numbers of at least 0"),
        (roll_latency, "--transports pigeon", "transports must be among auto, process_group, symmetric"),
        (roll_latency, "--seq-len 128 --documents 100", "--documents must be in [0, 32]"),
        (roll_latency, "--seq-len 126 --documents 4", "--seq-len must be a multiple of 4"),
        (roll_latency, "--ranks 4 --seq-len 256 --documents 33", "--documents must be in [0, 32]"),
        (roll_latency, "--rounds 1", "--rounds must be at least 2, got 1"),
        (soak, "--transports pigeon", "transports must be among auto, process_group, symmetric"),
        (soak, "--exchanges -1", "--exchanges must be at least 0, got -1"),
        (soak, "--exchanges 0 --activations 0", "--exchanges and --activations must not both be 0"),
    ],
)
def test_bad_arguments_are_said_before_ranks_start(program, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(program, "run_on_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(sys, "argv", ["program", "--device", "cpu", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said, said


PROGRAMS = [compare_modes, sweep, roll_latency, soak, parity, golden, train]


def end_of(program, arguments: list[str], monkeypatch, capsys) -> str:
    """Return the one line that a command says about its usage before it starts a rank."""
    monkeypatch.setattr(
        program, "run_on_ranks", lambda *_, **__: pytest.fail("ranks were started"), raising=False
    )
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as end:
        program.main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("program", [*PROGRAMS, scaling_model])
def test_an_out_that_is_no_folder_is_said_before_any_work(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "file")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/out"), Path("/proc/self")):
        arguments = [] if program is golden else ["--out", str(out)]
        if program is compare_modes or program is sweep:
            arguments += ["--presets" if program is sweep else "--preset", "tiny"]
        if program is scaling_model:
            arguments += ["--fast", str(ROOT / "experiments/results/step_time/2xH200/default")]
        assert "out must be a folder" in end_of(program, arguments, monkeypatch, capsys)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_variable_of_a_launcher_that_makes_no_sense_is_said(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    arguments = [] if program is golden else ["--out", str(tmp_path)]
    own = program in (parity, golden)
    for environment in ({"RANK": "abc"}, {"RANK": "0"}, {"RANK": "-1"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        said = end_of(program, arguments, monkeypatch, capsys)
        assert ("without torchrun" if own else "RANK") in said


@pytest.mark.parametrize("program", [*PROGRAMS, scaling_model])
def test_an_unknown_option_is_one_line(program, monkeypatch, capsys):
    assert "--colour" in end_of(program, ["--colour", "red"], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (parity, ["--dtypes", ""], "--dtypes must not be empty"),
        (parity, ["--dtypes", "float8"], "dtypes must be among"),
        (parity, ["--most-ranks", "0"], "--most-ranks must be at least 1, got 0"),
        (parity, ["--device", "tpu"], "invalid choice 'tpu'"),
        (soak, ["--device", "cpu", "--transports", "symmetric"], "--transports symmetric needs GPUs"),
        (train, ["--learning-rate", "inf"], "learning_rate must be in (0, 1], got inf"),
        (train, ["--deadline", "1e12"], "--deadline must be in [0, 1000000], got 1000000000000.0"),
        (train, ["--deadline", "nan"], "--deadline must be in [0, 1000000], got nan"),
        (train, ["--seed", "-1"], "--seed must be in [0, 2^63 - 1], got -1"),
        (train, ["--seed", "9223372036854775808"], "--seed must be in [0, 2^63 - 1]"),
        (train, ["--data", "no\nfile"], "no file does not exist"),
        (train, ["--data", "x" * 300], "File name too long"),
        (train, ["--data", "/dev/null"], "/dev/null is neither a file nor a link to one"),
        (scaling_model, ["--fast", "nowhere"], "nowhere must hold records of sweep.py"),
    ],
)
def test_usage_errors_are_one_line(program, arguments, message, monkeypatch, capsys, tmp_path):
    assert message in end_of(program, [*arguments, "--out", str(tmp_path)], monkeypatch, capsys)


def test_records_that_are_none_are_said_before_any_work(tmp_path, monkeypatch, capsys):
    for content in ("{", '{"experiment": "compare_modes"}'):
        (tmp_path / "x.json").write_text(content)
        arguments = ["--presets", "tiny", "--device", "cpu", "--out", str(tmp_path)]
        assert "x.json is not a record" in end_of(sweep, arguments, monkeypatch, capsys)
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "results.json").mkdir()
    said = end_of(compare_modes, ["--device", "cpu", "--out", str(tmp_path)], monkeypatch, capsys)
    assert "results.json must be a file that can be written to" in said
    (tmp_path / "results.json").rmdir()
    (tmp_path / "results.json").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind root
    assert said == end_of(compare_modes, ["--device", "cpu", "--out", str(tmp_path)], monkeypatch, capsys)
