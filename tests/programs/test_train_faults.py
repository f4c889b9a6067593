"""Ranks of experiments/train.py that die or hang: the others name them, and none of them is left over."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import pytest

from training_runs import after_steps, assert_a_hanging_rank_is_named, is_alive, ranks_of, start


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
        where = r'SIGTERM asks .*; rank 0 is in "(step|saving).*", rank 1 was in "(step|saving).*" at most \d+ s ago'
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
def test_a_run_that_is_told_to_end_while_it_starts_ends_before_its_first_step(tmp_path):
    """The launcher alone is told, when its rank has only begun to load Python."""
    run = start(tmp_path, "--ranks", "1")
    while not (ranks := ranks_of(run.pid)):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert "SIGTERM ended the run before step 1: --resume goes on with step 1" in output
    assert list(tmp_path.glob("checkpoints/*")) == []
    assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.slow
def test_torchruns_ranks_save_and_end_although_they_are_told_twice(tmp_path):
    """torchrun passes SIGTERM on. Its own status is 1 then, whatever its ranks' are."""
    before = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = start(tmp_path, "--cp", "2", "--steps", "5000", "--save-every", "0", before=before)
    ranks = after_steps(run, tmp_path, 3)
    run.send_signal(signal.SIGTERM)
    while "SIGTERM" not in run.stdout.readline():
        assert any(is_alive(pid) for pid in ranks)
    while any(is_alive(pid) for pid in ranks):
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    output, _ = run.communicate(timeout=40)
    last = len((tmp_path / "steps.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert f"SIGTERM ended the run after step {last}, which " in output, output
    assert "exitcode" not in output, output  # of a rank, if it is not 0
