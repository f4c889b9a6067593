"""experiments/train.py as a user runs it: killed, taken up again, at other sizes, by other schedules."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from train import main
from typer.testing import CliRunner

from overlap_mtp.model.config import PRESETS
from overlap_mtp.training.data import TokenError
from overlap_mtp.training.parallel import ParallelDims
from overlap_mtp.training.trainer import NonFiniteLossError, TrainConfig
from training.run import RunSettings, progress_bar
from training.run import said as said_of

from training_runs import STEPS, after_steps, records, start, train

# Of `straight`, and of what goes on from it: all that changes what is learned.
OPTIONS = ["--experts=2", "--aux-loss-factor=0.02", "--depths=3", "--mtp-loss-factor=0.2", "--derive-labels"]
OPTIONS += ["--detach-mtp", "--repeat-mtp-layer", "--normalisation=batch", "--clip=0.5"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing happened to: two cp ranks, with many an option."""
    out = tmp_path_factory.mktemp("straight")
    (out / "said.txt").write_text(train(out, "--cp", "2", "--accumulate", "2", *OPTIONS))
    return out


@pytest.mark.slow
def test_a_run_trains_and_says_so(straight):
    steps = records(straight)
    assert [one["step"] for one in steps] == list(range(1, STEPS + 1))
    assert [one["batches"] for one in steps] == list(range(2, 2 * STEPS + 1, 2))
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    assert all(one["aux_loss"] is not None and len(one["mtp_losses"]) == 3 for one in steps)
    assert all(one["grad_norms"]["trunk"] > 0.5 for one in steps)  # what they are clipped to
    for depth in range(3):
        accepted, weights = ([one["acceptance"][depth] for one in steps], [one["tokens"] for one in steps])
        of_all = steps[-1]["cumulative_acceptance"][depth]
        assert of_all == pytest.approx(np.average(accepted, weights=weights), rel=0.05)
        assert of_all != pytest.approx(accepted[-1], rel=0.1)
    assert (straight / "losses.png").stat().st_size > 10_000
    lines = (straight / "said.txt").read_text().splitlines()
    for step in steps:
        said = f"{step['step']}/{STEPS} LM {step['lm_loss']:.3f}, MTP {step['mtp_losses'][0]:.3f}"
        line = next(line for line in lines if line.startswith(said))
        assert all(word in line for word in ("aux", "accepted", "tokens/s", "GiB"))
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(straight, tmp_path):
    """SIGKILL to all of its processes in the middle of a step or of a checkpoint, twice; by any schedule."""
    out, arguments = tmp_path / "run", ["--cp", "2", "--accumulate", "2", *OPTIONS]
    for steps_until, more in ((3, []), (5, ["--resume", "--schedule", "sync"])):
        run = start(out, *arguments, *more)
        after_steps(run, out, steps_until)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    train(out, *arguments, "--resume", "--schedule", "prepared")
    assert records(out) == records(straight)


def test_the_progress_bar_shows_steps_and_the_last_one():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    record = {"lm_loss": 2.5, "mtp_losses": [3.5, 4.5], "aux_loss": 1.25, "acceptance": [0.5, 0.25]}
    record |= {"tokens_per_s": 12345.6, "stall_us": 7.4, "memory_gib": 1.5}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=8)
        progress.update(task, completed=3, description=said_of(record))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "3/8" in shown
    assert "━" in shown
    line = "LM 2.500, MTP 3.500 4.500, aux 1.250, accepted 50% 25%, 12,346 tokens/s, exposed 7 µs, 1.5 GiB"
    assert line in shown
    record |= {"mtp_losses": [3.5, None], "acceptance": [0.5, None]}  # no token has one two further
    assert "MTP 3.500 -, aux 1.250, accepted 50% -, " in said_of(record)


@pytest.mark.multi_gpu
def test_a_killed_deterministic_run_goes_on_to_the_same_bits_on_gpus(tmp_path):
    arguments = [
        "--device",
        "cuda",
        "--experts",
        "2",
        "--steps",
        "40",
        "--save-every",
        "10",
        "--deterministic",
    ]
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


@pytest.mark.multi_gpu
def test_compiled_and_recomputed_layers_train_on_gpus(tmp_path):
    """Compiled they round otherwise, recomputed they keep less."""
    options = [
        "--device",
        "cuda",
        "--deterministic",
        "--experts",
        "2",
        "--documents",
        "0",
        "--seq-len",
        "8192",
    ]
    runs = []
    for more in ([], ["--recompute"], ["--recompute", "--compile"]):
        out = tmp_path / "-".join(["run", *more])
        train(out, *options, *more, limit_s=300)
        runs.append([json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()])
    plain, recomputed, compiled = ([step["lm_loss"] for step in steps] for steps in runs)
    assert recomputed == plain
    assert compiled != plain
    assert compiled == pytest.approx(plain, rel=3e-2)
    assert plain[-1] < plain[0]
    assert runs[1][-1]["memory_gib"] < runs[0][-1]["memory_gib"]
    assert all(step["stall_us"] >= 0 for steps in runs for step in steps)


@pytest.mark.slow
def test_a_run_takes_the_data_that_it_is_given(tmp_path):
    """A text that says one thing over and over, of which a few steps at a high rate learn something."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 4000)
    options = ["--ranks", "1", "--cp", "1", "--data", str(text), "--documents", "0", "--experts", "3"]
    train(tmp_path / "run", *options, "--experts-per-token", "1", "--learning-rate", "1e-2", "--warmup", "0")
    steps = records(tmp_path / "run")
    assert steps[0]["lm_loss"] > 5
    assert steps[-1]["lm_loss"] < 4
    model = json.loads((tmp_path / "run/run.json").read_text())["settings"]["model"]
    assert (model["num_experts"], model["experts_per_token"]) == (3, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--cp", "1", "--tp", "2", "--accumulate", "2", "--schedule", "prepared"],
        ["--cp", "1", "--tp", "2", "--dp", "2", "--recompute"],
    ],
    ids=["tp", "dp x tp"],
)
def test_a_run_goes_on_at_other_sizes(straight, tmp_path, arguments):
    """From its fourth step, of eight."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for step in (6, 8):
        shutil.rmtree(out / f"checkpoints/step-{step:08}")
    train(out, *arguments, *OPTIONS, "--resume")
    for found, expected in zip(records(out), records(straight), strict=True):
        assert found["step"] == expected["step"]
        for name in ("loss", "lm_loss", "mtp_losses", "aux_loss", "grad_norms"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        assert found["cumulative_acceptance"] == pytest.approx(expected["cumulative_acceptance"], abs=1e-2)
    assert records(out)[:4] == records(straight)[:4]
    assert records(out)[4:] != records(straight)[4:]  # other sizes round otherwise: it did train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["holds a run: go on with --resume"]),
        (["--resume", "--experts", "3"], ["num_experts is 2 there, 3 here", "dp * accumulate is 2 there, 1"]),
    ],
)
def test_what_cannot_go_on_is_said(straight, arguments, words):
    run = start(straight, "--ranks", "1", *OPTIONS, *arguments)
    said, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    said = " ".join(said.replace("│", " ").split())
    assert all(one in said for one in words), said
    assert "Traceback" not in said


def invoke(*arguments: str):
    """train.py in this process."""
    command = typer.Typer()
    command.command()(main)
    return CliRunner().invoke(command, list(arguments))


def test_runs_of_one_identity_see_the_same_batches():
    """A checkpoint says what documents are padded to: cp 3 packs them otherwise, and cannot go on from cp 2."""
    found = []
    for cp in (1, 2, 4, 8, 3):
        settings = RunSettings(
            PRESETS["tiny"].model,
            TrainConfig(steps=1),
            ParallelDims(cp=cp),
            "prefetch",
            768,
            3,
            Path("nowhere"),
        )
        batch, layout = settings.stream().batch(1)
        found.append((settings.identity, layout.cu_seqlens.tolist(), layout.valid_lengths.tolist(), batch))
    identity, *bounds, batch = found[0]
    for other_identity, *other_bounds, other_batch in found[1:4]:
        assert (other_identity, other_bounds) == (identity, bounds)
        assert all(torch.equal(other_batch[name], batch[name]) for name in batch)
    assert found[4][1] != bounds[0]
    assert found[4][0] != identity


@pytest.mark.parametrize(
    "error", [NonFiniteLossError("step 3: the LM loss is nan"), TokenError("token id 999")]
)
def test_our_own_errors_need_no_traceback_under_torchrun(tmp_path, monkeypatch, error):
    def raise_it(*_, **__):
        raise error

    monkeypatch.setattr("train.run_on_ranks", raise_it)
    done = invoke("--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "8")
    assert done.exit_code == 1
    assert done.output.strip() == f"{type(error).__module__}.{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0"], "keep must be >= 1, got 0"),
        (["--save-every", "-1"], "save_every must be >= 0, got -1"),
        (["--deadline", "0"], "deadline must be >= 5 s, got 0"),
        (["--dp", "0"], "dp must be >= 1, got 0"),
        (["--cp", "0"], "cp must be >= 1, got 0"),
        (["--tp", "3"], "num_kv_heads must be a multiple of tp = 3"),
        (["--seq-len", "0"], "seq_len must be >= 1, got 0"),
        (["--cp", "1", "--seq-len", "16"], "seq_len must be a multiple of 16, and greater"),
        (
            ["--cp", "2", "--seq-len", "1000"],
            "seq_len must be a multiple of 16, and greater",
        ),
        (["--deadline", "1e20"], "Python int too large"),
        (["--cp", "2", "--ranks", "4"], "1 * 2 * 1 = 2, got 4 ranks"),
        (["--warmup", "9"], "warmup_steps must be in [0, steps = 8], got 9"),
        (["--experts", "2", "--experts-per-token", "3"], "experts_per_token must be in [1, num_experts = 2]"),
        (["--preset", "huge"], "preset must be one of"),
        (["--compile", "--tp", "2"], "--compile and tp > 1 do not go together"),
        (["--curves", "nowhere"], "nowhere holds no steps.jsonl"),
        (["--out", __file__], "out must be a folder, or a path for one"),
    ],
)
def test_settings_are_refused_before_a_rank_is_started(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("train.run_on_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    done = invoke("--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "8", *arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_no_gpu_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke("--out", str(tmp_path / "run"), "--device", "cuda")
    assert done.exit_code == 2, done.output
    assert "it has no GPU that torch can use" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_a_token_outside_of_the_vocabulary_is_said(tmp_path):
    data = tmp_path / "ids.bin"
    np.full(40_000, 999, dtype=np.uint16).tofile(data)
    run = start(tmp_path / "run", "--ranks", "1", "--cp", "1", "--data", str(data))
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert re.search(r"TokenError: token id 999 in ids.bin\[\d+\] is outside of the vocabulary", said), said
    assert "Traceback" not in said


def test_a_run_that_took_no_step_begins_again(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("train.run_on_ranks", lambda *_, **__: started.append(1))
    log, checkpoint = tmp_path / "steps.jsonl", tmp_path / "checkpoints/step-00000001"
    for prepare, code in (
        (lambda: log.write_text(""), 0),
        (lambda: log.write_text('{"step": 1}\n'), 2),
        (lambda: (log.unlink(), checkpoint.mkdir(parents=True)), 2),  # the log was deleted
    ):
        prepare()
        done = invoke("--out", str(tmp_path), "--device", "cpu")
        assert done.exit_code == code, done.output
    assert len(started) == 1


@pytest.mark.slow
def test_a_finished_run_without_its_log_is_resumed_to_its_end(straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    (out / "steps.jsonl").unlink()
    said = train(out, "--cp", "2", "--accumulate", "2", *OPTIONS, "--resume")
    assert f"step {STEPS} of {STEPS} is in " in said
    assert f"lacks {STEPS} of the steps that the checkpoint holds" in said
    assert (out / "steps.jsonl").read_text() == ""
