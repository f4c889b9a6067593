"""experiments/train.py as a user runs it: killed, resumed, at other parallel dimensions, by other schedules."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import training.run
from overlap_mtp.training.step_log import StepLog
from training.settings import RunSettings

from rank_pool import RankError, RankPool
from training_runs import STEPS, after_steps, is_alive, records, settings_of, start, train, train_in_pool

# Options of `straight` and of the runs that go on from it: all that change what is learned.
LEARNING = ["--experts=2", "--aux-loss-factor=0.02", "--depths=3", "--mtp-loss-factor=0.2", "--derive-labels"]
LEARNING += ["--detach-mtp", "--repeat-mtp-layer", "--normalisation=batch", "--clip=0.5", "--warmup=2"]
LEARNING += [
    "--mtp-inputs=embeddings",
    "--hidden-state-mixing",
    "--distillation=kl",
    "--distillation-weight=0.5",
]

OTHER_DIMENSIONS = ["--dp", "2", "--cp", "1", "--tp", "2", "--recompute", "--schedule", "prepared"]
OTHER_DIMENSIONS += ["--activation-schedule", "merged"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run without faults, on two cp ranks, with many options."""
    out = tmp_path_factory.mktemp("straight")
    (out / "output.txt").write_text(
        train(out, "--cp", "2", "--accumulate", "2", *LEARNING, "--peak-tflops=.01", "--profile=1")
    )
    return out


@pytest.fixture
def copy(straight, tmp_path) -> Iterator[Path]:
    """A copy of `straight` to go on from."""
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_trains_and_reports_it(straight):
    steps = records(straight)
    assert [one["step"] for one in steps] == list(range(1, STEPS + 1))
    assert [one["batches"] for one in steps] == list(range(2, 2 * STEPS + 1, 2))
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    assert all(one["aux_loss"] is not None and len(one["mtp_losses"]) == 3 for one in steps)
    assert all(one["grad_norms"]["trunk"] > 0.5 for one in steps)  # the norm that they are clipped to
    for depth in range(3):
        accepted, weights = ([one["acceptance"][depth] for one in steps], [one["tokens"] for one in steps])
        cumulative = steps[-1]["cumulative_acceptance"][depth]
        assert cumulative == pytest.approx(np.average(accepted, weights=weights), rel=0.05)
        assert cumulative != pytest.approx(accepted[-1], rel=0.1)
    for rank in range(2):
        with gzip.open(straight / f"profile/rank{rank}.json.gz", "rt") as file:
            found = re.findall(rf'"step \w+ r{rank}"', file.read())
        assert found == [f'"step prefetch r{rank}"']
    assert (straight / "losses.png").stat().st_size > 10_000
    lines = (straight / "output.txt").read_text().splitlines()
    for step in steps:
        begin = f"{step['step']}/{STEPS} LM {step['lm_loss']:.3f}, MTP {step['mtp_losses'][0]:.3f}"
        line = next(line for line in lines if line.startswith(begin))
        assert all(
            word in line for word in ("aux", "accepted", "tokens/s", "TFLOP/s a rank, MFU ", "%, ", "GiB")
        )
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(straight, tmp_path):
    """Kill it in the middle of a step or of a checkpoint, then end it by a signal, and finish it.

    Each time by another schedule. First only the launcher is killed, while it ignores SIGINT as it does in the
    background of a shell: its ranks end with it. Then one of the ranks is told to stop, and all save the same step.
    """
    out, arguments = tmp_path / "run", ["--cp", "2", "--accumulate", "2", *LEARNING]
    run = start(out, *arguments, ignoring_sigint=True)
    try:
        ranks = after_steps(run, out, 3)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)  # so that the run cannot end by itself
        run.kill()
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 30
        while any(is_alive(pid) for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert 3 <= len(records(out)) < STEPS
    run = start(out, *arguments, "--resume", "--schedule", "sync")
    os.kill(after_steps(run, out, 5)[1], signal.SIGUSR1)
    output, _ = run.communicate(timeout=240)
    step = len(records(out))
    assert (run.returncode, 5 <= step < STEPS) == (0, True), output
    asked = r'SIGUSR1 asks the run to end after this step; rank 1 is in "(step|saving) .*", rank 0 was in ".*" at most'
    assert re.search(asked, output), output
    assert f"SIGUSR1 ended the run after step {step}, which {out}/checkpoints/step-{step:08} holds" in output
    assert f"--resume goes on with step {step + 1}" in output
    with RankPool(2) as pool:
        other = ["--schedule", "prepared", "--activation-schedule", "sync"]
        settings = settings_of(out, *arguments, "--resume", *other)
        assert f"step {step} of {STEPS} is in " in pool.run(train_in_pool, 2, settings)[0]
    assert records(out) == records(straight)


def told(group: dist.ProcessGroup, settings: RunSettings, by_rank: dict[int, str]) -> str:
    """Train while ranks are told to stop: at the start of the run, in its second step, or while it saves that."""
    moment = by_rank.get(group.rank(), "")
    received = [signal.SIGUSR1] if moment == "start" else []
    with pytest.MonkeyPatch.context() as patch:

        def then(function):
            def called(one: training.run.Run):
                if one.steps_done == 2 - (moment == "step"):
                    received.append(signal.SIGUSR1)
                return function(one)

            return called

        patch.setattr(training.run, "stop_signal", lambda: (*received, 0)[0])
        if moment in ("step", "save"):
            patch.setattr(training.run.Run, moment, then(getattr(training.run.Run, moment)))
        return train_in_pool(group, settings)


@pytest.mark.slow
def test_all_ranks_end_after_the_same_step_whoever_is_told(ranks: RankPool, tmp_path):
    steps = "SIGUSR1 ended the run after step 2, which .*step-00000002 holds: --resume goes on with step 3"
    for number, (by_rank, ends) in enumerate(
        [
            ({1: "start"}, "SIGUSR1 ended the run before step 1: --resume goes on with step 1"),
            ({2: "step", 0: "save"}, steps),
            ({3: "save"}, steps),
        ]
    ):
        settings = settings_of(out := tmp_path / str(number), "--dp", "2", "--cp", "2")
        output, *others = ranks.run(told, 4, settings, by_rank)
        assert others == [""] * 3
        assert re.search(ends, output), output
        assert [one["step"] for one in records(out)] == ([1, 2] if number else [])
        saved = [out / "checkpoints/step-00000002"] if number else []
        assert list(out.glob("checkpoints/*")) == saved


@pytest.mark.slow
def test_a_run_goes_on_at_other_dimensions(copy, straight, ranks: RankPool):
    """From its fourth step of eight, and after the last one, which a longer run follows."""
    for step in (6, 8):
        shutil.rmtree(copy / f"checkpoints/step-{step:08}")
    settings = settings_of(copy, *LEARNING, "--resume", *OTHER_DIMENSIONS)
    assert "step 4 of 8 is in " in ranks.run(train_in_pool, 4, settings)[0]
    for found, expected in zip(records(copy), records(straight), strict=True):
        assert found["step"] == expected["step"]
        for name in ("loss", "lm_loss", "mtp_losses", "aux_loss", "grad_norms"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        assert found["cumulative_acceptance"] == pytest.approx(expected["cumulative_acceptance"], abs=1e-2)
    assert records(copy)[:4] == records(straight)[:4]
    assert records(copy)[4:] != records(straight)[4:]  # these dimensions round differently: it did train

    (copy / "steps.jsonl").unlink()
    longer = replace(settings, steps=STEPS + 1)
    output = ranks.run(train_in_pool, 4, longer)[0]
    assert f"step {STEPS} of {STEPS + 1} is in " in output
    assert f"lacks {STEPS} of the steps that the checkpoint holds" in output
    (record,) = records(copy)
    rate = record["learning_rate"] / settings.learning_rate
    assert (record["step"], rate) == (STEPS + 1, longer.train_config.schedule(STEPS))
    assert rate > settings.train_config.schedule(STEPS)


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_why(copy, ranks: RankPool):
    with pytest.raises(
        ValueError, match=r"num_experts is 2 there, 3 here.* dp . accumulate is 2 there, 1 here"
    ):
        settings_of(copy, *LEARNING, "--resume", "--cp", "4", "--experts", "3")
    log = StepLog(copy / "steps.jsonl", STEPS)  # as a process does that trains
    settings = settings_of(copy, *LEARNING, "--resume", "--cp", "4", "--accumulate", "2")
    with pytest.raises(RankError, match="is being written by another process: end that run, or take another"):
        ranks.run(train_in_pool, 4, settings)
    log.close()


@pytest.mark.slow
def test_a_token_outside_of_the_vocabulary_is_named_without_a_traceback(tmp_path):
    data = tmp_path / "ids.bin"
    np.full(40_000, 999, dtype=np.uint16).tofile(data)
    run = start(tmp_path / "run", "--ranks", "1", "--cp", "1", "--data", str(data))
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 1
    found = (
        r"TokenError: token id 999 in ids.bin\[\d+\] is outside of .* or vocab_size \(--vocab-size\) larger"
    )
    assert re.search(found, output), output
    assert "Traceback" not in output
