"""The benchmark and the tests of the drop-in in Megatron-LM, from the command line on CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import megatron_step
import megatron_tests
import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, f"experiments/{program}.py", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_drop_in_keeps_every_bit_of_a_step_and_of_a_training(tmp_path):
    sizes = ["--ranks", "2", "--rounds", "2", "--warmup", "1", "--documents", "0,4", "--train-steps", "2"]
    done = run("megatron_step", *sizes, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the losses of 2 of 2 steps are equal to the bit, final weights too" in done.stdout
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["passed"]
    assert str(ROOT) not in json.dumps(record)
    runs = record["runs"]
    host = {"megatron_host", "dropin_host"}
    for name, modes in (("dense", set(megatron_step.MODES) - host), ("4", set(megatron_step.MODES))):
        bits = runs[name]["bits"]
        assert set(bits) == modes - {"megatron"} | {"megatron again"}
        for mode, row in bits.items():
            same = (row["loss"], row["mtp_losses"], row["equal_gradients"] == row["gradients"] > 0)
            assert same == ((True, False, False) if mode == "none" else (True, True, True)), mode
        assert set(runs[name]["times_ms"]["wall_ms"]) == modes
        assert runs[name]["rounds"] == 2
        assert runs[name]["status"]["answered"] > 0
        assert runs[name]["status"]["transports"] == ["process_group"]
        losses = runs[name]["training"]["losses"]
        assert losses["megatron"] == losses["dropin"]
        assert losses["megatron"][0] != losses["megatron"][1]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "step_time.png"}
    assert "| 4 | dropin |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (megatron_step, "--preset huge", "preset must be one of h4096, h2048, tiny, got 'huge'"),
        (megatron_step, "--documents dense", "--documents: must be whole numbers of at least 0"),
        (megatron_step, "--documents 500", "--documents must be in [0, 32] at this size (0: dense), got 500"),
        (megatron_step, "--modes fast", "modes must be among"),
        (megatron_step, "--rounds 1", "--rounds must be 0 or at least 2, got 1"),
        (megatron_step, "--tp 3", "tp must be at least 1 and divide the number of ranks, 2, got 3"),
        (megatron_step, "--sequence-parallel", "--sequence-parallel needs --tp of 2 or more"),
        (megatron_step, "--checkout nowhere", "it has no megatron/core"),
        (megatron_step, "--profile nsys", "need GPUs"),
        (megatron_step, "--schedule soon", "schedule must be one of sync, "),
        (megatron_step, "--schedule prepared", "schedule must be one of sync, "),
        (megatron_tests, "--checkout nowhere", "checkout must be a folder of Megatron-LM"),
    ],
)
def test_bad_arguments_are_said_before_ranks_start(
    program, arguments, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(program, "run_on_ranks", lambda *_: pytest.fail("ranks were started"), raising=False)
    monkeypatch.setattr(
        sys, "argv", ["program", "--device", "cpu", "--out", str(tmp_path), *arguments.split()]
    )
    for name in megatron_step.VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that main changes none
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said, said


def test_tests_that_end_differently_are_found():
    def of(**outcomes: str) -> dict:
        return {"rank0": {"outcomes": {test: [outcome, ""] for test, outcome in outcomes.items()}}}

    assert megatron_tests.differences(of(a="passed", b="failed"), of(a="passed", b="failed")) == []
    [one] = megatron_tests.differences(of(a="passed", b="skipped"), of(a="failed", b="skipped"))
    assert (one["test"], one["without"], one["with"]) == ("a", "passed", "failed")
    [one] = megatron_tests.differences(of(a="passed"), {})
    assert one["with"] == "not run"
    assert megatron_tests.totals(of(a="passed", b="passed", c="failed")) == {"passed": 2, "failed": 1}
