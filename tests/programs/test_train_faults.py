"""Ranks of experiments/train.py that die or hang: the others name them, and none of them is left over."""

from __future__ import annotations

import os
import re
import signal

import pytest

from training_runs import after_steps, assert_a_hanging_rank_is_named, is_alive, start


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train.py", "torchrun"])
def test_a_rank_that_is_killed_is_named_with_its_phase(tmp_path, launcher):
    """By either launcher; and none of the ranks is left."""
    before = [] if launcher == "train.py" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = start(tmp_path, "--cp", "2", "--steps", "5000", "--deadline", "8", before=before)
    ranks = after_steps(run, tmp_path, 3)
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = run.communicate(timeout=20)
    assert run.returncode != 0
    assert not any(is_alive(pid) for pid in ranks)
    if launcher == "train.py":
        assert re.search(r'rank 1 is gone: no heartbeat for \d+ s, the last in "', output), output
        assert re.search(r'rank 0 of 2 was in "(step|saving)', output), output
        assert "Traceback" not in output.split("overlap_mtp: ")[0]
    else:  # torchrun names the rank, and ends the others at once
        where = r'ended by the launcher; rank 0 was in "(step|saving).*", rank 1 in "(step|saving)'
        assert re.search(where, output), output
        assert re.search(r"rank +: 1 ", output), output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "hangs_in", "step"),
    [
        ("--ranks 4 --dp 2 --cp 2", "first layer", 1),
        ("--ranks 2 --cp 2 --schedule merged", "loss", 2),  # after rank 1 was late in step 1, but in time
    ],
)
def test_a_rank_that_hangs_in_the_middle_of_a_step_is_named(tmp_path, arguments, hangs_in, step):
    """The others are in an exchange or in a collective."""
    assert_a_hanging_rank_is_named(tmp_path, arguments, hangs_in, step)


@pytest.mark.slow
def test_a_launcher_that_ignores_sigint_does_not_call_an_interrupted_run_finished(tmp_path):
    run = start(tmp_path, "--ranks", "1", "--steps", "5000", ignoring_sigint=True)
    ranks = after_steps(run, tmp_path, 3, num_ranks=1)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert run.returncode != 0, output
    assert "SIGINT" in output or "KeyboardInterrupt" in output, output
    assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "num_ranks"), [(signal.SIGTERM, os.kill, 1), (signal.SIGUSR1, os.killpg, 2)]
)
def test_a_run_that_is_told_to_end_saves_its_step(tmp_path, number, whom, num_ranks):
    """The launcher alone is told, or all processes are, as Slurm does it."""
    run = start(tmp_path, "--ranks", str(num_ranks), "--steps", "5000", "--save-every", "0")
    ranks = after_steps(run, tmp_path, 3, num_ranks)
    whom(run.pid, number)
    output, _ = run.communicate(timeout=40)
    assert run.returncode == 128 + number, output
    last = len((tmp_path / "steps.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"{number.name} ended the run after step {last}: use --resume" in output
    assert not any(is_alive(pid) for pid in ranks)
