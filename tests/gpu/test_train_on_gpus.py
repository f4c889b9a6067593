"""experiments/train.py on GPUs: killed, recomputed, compiled, hanging."""

from __future__ import annotations

import os
import signal
import time

import pytest

from overlap_mtp.training.step_log import read_records

from training_runs import assert_a_hanging_rank_is_named, records, start, train

DETERMINISTIC = ["--device", "cuda", "--experts", "2", "--deterministic"]

pytestmark = pytest.mark.multi_gpu


def test_a_killed_deterministic_run_goes_on_to_the_same_bits_on_gpus(tmp_path):
    arguments = [*DETERMINISTIC, "--steps", "40", "--save-every", "10"]
    train(tmp_path / "straight", *arguments)
    out = tmp_path / "run"
    run = start(out, *arguments)
    while not (out / "checkpoints/step-00000020").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    train(out, *arguments, "--resume", "--schedule", "sync")
    assert records(out) == records(tmp_path / "straight")


def test_compiled_and_recomputed_layers_train_on_gpus(tmp_path):
    """Compiled layers round differently, recomputed ones need less memory."""
    options = [*DETERMINISTIC, "--documents", "0", "--seq-len", "8192"]
    runs = []
    for more in ([], ["--recompute"], ["--recompute", "--compile"]):
        out = tmp_path / "-".join(["run", *more])
        train(out, *options, *more, limit_s=300)
        runs.append(read_records(out / "steps.jsonl"))
    plain, recomputed, compiled = ([step["lm_loss"] for step in steps] for steps in runs)
    assert recomputed == plain
    assert compiled != plain
    assert compiled == pytest.approx(plain, rel=3e-2)
    assert plain[-1] < plain[0]
    assert runs[1][-1]["memory_gib"] < runs[0][-1]["memory_gib"]
    assert all(step["stall_us"] >= 0 for steps in runs for step in steps)


@pytest.mark.parametrize(
    ("options", "hangs_in", "step"), [("", "first layer", 1), ("--experts 2", "layer", 2)]
)
def test_a_rank_that_hangs_on_a_gpu_is_named(tmp_path, options, hangs_in, step):
    """The others wait for their GPU."""
    assert_a_hanging_rank_is_named(tmp_path, f"--device cuda --ranks 2 --cp 2 {options}", hangs_in, step)
