"""Ranks of experiments/train.py that die or hang: who the others say it was, and that none is left over."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import pytest

from training_runs import after_steps, is_alive, ranks_of, start


@pytest.mark.slow
def test_ranks_end_with_their_launcher_and_one_run_writes_at_a_time(tmp_path):
    """Also where a shell started it in the background, which has it ignore SIGINT."""
    arguments = ["--cp", "2", "--documents", "2", "--steps", "5000"]
    run = start(tmp_path, *arguments, ignoring_sigint=True)
    ranks = after_steps(run, tmp_path, 3)
    try:
        os.killpg(run.pid, signal.SIGSTOP)
        second = start(tmp_path, *arguments, "--resume")
        said, _ = second.communicate(timeout=60)
        assert second.returncode != 0
        assert "is being written by another process: end that run, or take another folder" in said
        assert "Traceback" not in said
        os.killpg(run.pid, signal.SIGCONT)
        run.kill()
        deadline = time.monotonic() + 30
        while any(is_alive(pid) for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train.py", "torchrun"])
def test_a_rank_that_is_killed_is_named_with_its_phase(tmp_path, launcher):
    """Whoever started the ranks; and none of them is left."""
    started = [] if launcher == "train.py" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = start(tmp_path, "--cp", "2", "--steps", "5000", "--deadline", "8", before=started)
    ranks = after_steps(run, tmp_path, 3)
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = run.communicate(timeout=20)
    assert run.returncode != 0
    assert not any(is_alive(pid) for pid in ranks)
    if launcher == "train.py":
        assert re.search(r'rank 1 is gone: no sign of it for \d+ s, the last was in "', said), said
        assert re.search(r'rank 0 of 2 was in "(step|saving)', said), said
        assert "Traceback" not in said.split("overlap_mtp: ")[0]
    else:  # which names the rank, and ends the others at once
        where = r'ended by the launcher; rank 0 was in "(step|saving).*", rank 1 in "(step|saving)'
        assert re.search(where, said), said
        assert re.search(r"rank +: 1 ", said), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "where", "step"),
    [
        ("--device cpu --ranks 4 --dp 2 --cp 2", "first layer", 1),
        ("--device cpu --ranks 2 --cp 2 --schedule merged", "loss", 2),
        pytest.param("--device cuda --ranks 2 --cp 2", "first layer", 1, marks=pytest.mark.multi_gpu),
        pytest.param("--device cuda --ranks 2 --cp 2 --experts 2", "layer", 2, marks=pytest.mark.multi_gpu),
    ],
)
def test_a_rank_that_hangs_in_the_midst_of_a_step_is_named(tmp_path, arguments, where, step):
    """And lives; in a second step, after it was late but in time in the first. The others are in the same phase: in an
    exchange, a collective or, on GPUs, behind either."""
    run = start(tmp_path, *arguments.split(), "--deadline", "8", program="tests/hung_run.py", where=where)
    while (line := run.stdout.readline()) != "here\n":
        assert line, run.communicate()[0]
    begin, ranks = time.monotonic(), ranks_of(run.pid)
    said, _ = run.communicate(timeout=60)
    assert time.monotonic() - begin < 8 + 4
    assert run.returncode != 0
    assert not any(is_alive(pid) for pid in ranks)
    found = re.findall(r"overlap_mtp: (.*); rank \d+ of", said)
    assert len(found) == len(ranks)
    for one in found:
        assert re.match(
            rf'rank 1 has not arrived after \d+ s: it is still in "step {step}, .*: microbatch 0"', one
        ), said
