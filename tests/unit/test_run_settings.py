"""The options of experiments/train.py: what they make of a run, and which are refused before a rank starts."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train
from rich.console import Console

from overlap_mtp.model.config import PRESETS
from overlap_mtp.training.checkpoint_record import write_run
from overlap_mtp.training.data import TokenError
from overlap_mtp.training.parallel import ParallelDims
from overlap_mtp.training.trainer import NonFiniteLossError, TrainConfig
from training.run import line_of, progress_bar
from training.settings import RunSettings

OPTIONS = """--dp 3 --tp 2 --ranks 12 --experts 3 --experts-per-token 1 --aux-loss-factor 0.02 --depths 1
    --mtp-loss-factor 0.2 --derive-labels --detach-mtp --repeat-mtp-layer --steps 9 --learning-rate 1e-2 --clip 0.5
    --accumulate 4 --normalisation batch --documents 0 --vocab-size 300
    --mtp-inputs embeddings --distillation tv --distillation-weight 0.5 --activation-schedule merged"""


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Return a function that calls train.py in this process: (exit status, message, arguments of run_on_ranks)."""

    def call(*arguments: str, error: Exception | None = None) -> tuple[int, str, list]:
        started = []

        def run_on_ranks(*given, **_):
            started.append(given)
            if error is not None:
                raise error

        monkeypatch.setattr(train, "run_on_ranks", run_on_ranks)
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *arguments])
        try:
            train.main()
        except SystemExit as end:
            if isinstance(end.code, str):  # which the interpreter prints, and exits with 1
                return 1, end.code, started
            return end.code, capsys.readouterr().err, started
        return 0, capsys.readouterr().out, started

    return call


def test_options_become_model_training_and_dimensions(invoke, tmp_path):
    """All that change what is learned; tyro reads them as a user gives them."""
    status, _, [(_, ranks, device, settings)] = invoke("--out", str(tmp_path), *OPTIONS.split())
    assert (status, ranks, device) == (0, 12, "cpu")
    assert settings.model == replace(
        PRESETS["tiny"].model,
        vocab_size=300,
        num_experts=3,
        experts_per_token=1,
        aux_loss_factor=0.02,
        num_depths=1,
        mtp_loss_factor=0.2,
        derive_labels=True,
        detach_mtp=True,
        repeat_mtp_layer=True,
        mtp_inputs="embeddings",
        distillation="tv",
        distillation_weight=0.5,
    )
    assert settings.activation_schedule == "merged"
    assert settings.train_config == TrainConfig(9, 1e-2, 9, clip_norm=0.5, normalisation="batch")
    assert settings.dims == ParallelDims(3, 2, 2)  # cp is what dp and tp leave
    assert settings.stream(settings.corpus()).num_documents is None
    _, _, [(*_, settings)] = invoke(
        "--out", str(tmp_path), "--warmup", "5", "--data", __file__, "--documents", "2"
    )
    assert settings.train_config.warmup_steps == 5
    assert settings.dims == ParallelDims(1, 2, 1)
    assert {one.path for one in settings.corpus().documents} == {Path(__file__)}


def test_runs_of_one_identity_see_the_same_batches():
    """Documents are padded differently at cp 3: such a run cannot resume from cp 2."""
    found = []
    for cp in (1, 2, 4, 8, 3):
        settings = RunSettings(cp=cp, seq_len=768, documents=3, steps=1)
        batch, layout = settings.stream(corpus := settings.corpus()).batch(1)
        bounds = layout.cu_seqlens.tolist(), layout.valid_lengths.tolist()
        found.append((settings.identity(corpus), bounds, [tensor.tolist() for tensor in batch.values()]))
    assert found[1:4] == found[:1] * 3
    assert found[4][0] != found[0][0]
    assert found[4][1] != found[0][1]


def test_the_progress_bar_shows_steps_and_the_last_record():
    screen = io.StringIO()
    record = {"lm_loss": 2.5, "mtp_losses": [3.5, 4.5], "aux_loss": 1.25, "acceptance": [0.5, 0.25]}
    record |= {"tokens_per_s": 12345.6, "tflops_per_gpu": 412.34, "mfu": 0.4168}
    record |= {"stall_us": 7.4, "memory_gib": 1.5}
    with progress_bar(Console(file=screen, force_terminal=True, width=200)) as progress:
        task = progress.add_task("", total=8)
        progress.update(task, completed=3, description=line_of(record, on_gpu=True))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    line = "LM 2.500, MTP 3.500 4.500, aux 1.250, accepted 50% 25%, 12,346 tokens/s, "
    line += "412 TFLOP/s a GPU, MFU 41.7%, stall 7 µs, 1.5 GiB"
    assert all(one in shown for one in ("3/8", "━", line))
    record |= {
        "mtp_losses": [3.5, None],
        "acceptance": [0.5, None],
        "mfu": None,
    }  # no token counts at depth 2
    assert "MTP 3.500 -, aux 1.250, accepted 50% -, " in line_of(record, on_gpu=True)
    assert "412 TFLOP/s a GPU, stall" in line_of(record, on_gpu=True)
    assert "412 TFLOP/s a rank, stall" in line_of(record, on_gpu=False)


@pytest.mark.parametrize(
    "error", [NonFiniteLossError("step 3: the LM loss is nan"), TokenError("token id 999"), OSError("disk")]
)
def test_our_own_errors_need_no_traceback_under_torchrun(invoke, tmp_path, error):
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="disk"):
            invoke("--out", str(tmp_path), error=error)
    else:
        line = f"{type(error).__module__}.{type(error).__name__}: {error}"
        assert invoke("--out", str(tmp_path), error=error)[:2] == (1, line)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--keep 0", "--keep must be at least 1, got 0"),
        ("--save-every -1", "--save-every must be at least 0, got -1"),
        ("--deadline 0", "--deadline must be at least 5.0, got 0"),
        ("--deadline 1e20", "--deadline must be in [0, 1000000], got 1e+20"),
        ("--deadline nan", "--deadline must be in [0, 1000000], got nan"),
        ("--save-deadline -1", "--save-deadline must be in [0, 1000000], got -1"),
        ("--dp 0", "dp must be >= 1, got 0"),
        ("--cp 0", "cp must be >= 1, got 0"),
        ("--tp 3", "num_kv_heads must be a multiple of tp = 3"),
        ("--seq-len 0", "seq_len must be >= 1, got 0"),
        ("--cp 1 --seq-len 16", "seq_len must be a multiple of 16, and greater, for documents"),
        ("--cp 2 --seq-len 1000", "seq_len must be a multiple of 16, and greater, for documents"),
        ("--cp 2 --ranks 4", "1 * 2 * 1 = 2, got 4 ranks"),
        ("--accumulate 0", "--accumulate must be at least 1, got 0"),
        ("--vocab-size 0", "vocab_size must be >= 1, got 0"),
        ("--tp 2 --vocab-size 301", "vocab_size must be a multiple of tp = 2, got 301"),
        ("--peak-tflops 0", "--peak-tflops must be finite and > 0, got 0"),
        ("--warmup 9", "warmup_steps must be in [0, steps = 8], got 9"),
        ("--experts 2 --experts-per-token 3", "experts_per_token must be in [1, num_experts = 2]"),
        ("--preset huge", "preset must be one of"),
        ("--schedule never", "schedule must be one of"),
        ("--activation-schedule prefetch", "invalid choice 'prefetch'"),
        ("--depths 1 --hidden-state-mixing", "hidden_state_mixing needs num_depths >= 2, got 1"),
        ("--distillation kl --distillation-weight 0", "distillation_weight must be finite and > 0, got 0"),
        ("--compile --tp 2", "--compile and tp > 1 do not go together"),
        ("--curves nowhere", "nowhere holds no steps.jsonl"),
        (f"--out {__file__}", "out must be a folder, or a path for one"),
        ("--device cuda", "it has no GPU that torch can use"),
    ],
)
def test_illegal_options_are_refused_in_one_line(invoke, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, message, started = invoke("--out", str(tmp_path / "run"), "--steps", "8", *options.split())
    assert (status, started, message.count("\n")) == (2, [], 1)
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_took_no_step_begins_again_and_another_needs_resume(invoke, tmp_path):
    log, checkpoint = tmp_path / "steps.jsonl", tmp_path / "checkpoints/step-00000001"
    log.write_text("")
    assert invoke("--out", str(tmp_path))[0] == 0
    log.write_text('{"step": 1}\n')
    status, message, started = invoke("--out", str(tmp_path))
    assert (status, started) == (2, [])
    assert "holds a run: go on with --resume" in message
    log.unlink()
    checkpoint.mkdir(parents=True)  # the log was deleted
    assert invoke("--out", str(tmp_path))[0] == 2
    status, message, _ = invoke("--out", str(tmp_path), "--resume")
    assert status == 2
    assert re.search(r"step-00000001: run.json is half-written .*; delete its folder to resume from", message)


def write_checkpoint(out: Path, identity: dict) -> None:
    """Write what says that a run has saved step 25."""
    (path := out / "checkpoints/step-00000025").mkdir(parents=True, exist_ok=True)
    files, progress = {".metadata": 1, "state.pt": 1}, {"step": 25}
    write_run(path, {"files": files, "progress": progress, "identity": identity, "layout": {}})


def test_a_run_goes_on_with_its_own_options_and_for_as_long_or_longer(invoke, tmp_path):
    _, _, [(*_, settings)] = invoke("--out", str(tmp_path), "--steps", "30")
    identity = {"optimizer": "AdamW", **settings.identity(settings.corpus())}
    write_checkpoint(tmp_path, identity)
    for steps in ("30", "25", "99"):
        assert invoke("--out", str(tmp_path), "--resume", "--steps", steps)[0] == 0
    identity["train_config.warmup_steps"] = 4  # of a run of 4 steps that did not say it
    write_checkpoint(tmp_path, identity)
    assert invoke("--out", str(tmp_path), "--resume", "--steps", "99")[0] == 0
    assert "warmup_steps is 4 there, 5 here" in invoke("--out", str(tmp_path), "--resume", "--warmup", "5")[1]
    identity["train_config.warmup_steps"] = 20
    write_checkpoint(tmp_path, identity)
    for options, words in {
        "--steps 24": "--steps must be at least 25, the step of the last checkpoint in .*, got 24: give more steps, or",
        "--experts 2": "num_experts is 0 there, 2 here: use the same, or begin a new run in another folder",
        "--seq-len 512 --seed 3": "step-00000025: the .* seed is 0 there, 3 here; seq_len is 1024 there, 512 here",
    }.items():
        status, message, started = invoke("--out", str(tmp_path), "--resume", *options.split())
        assert (status, started, message.count("\n")) == (2, [], 1)
        assert re.search(words, message), message


def test_a_checkpoint_older_than_rolls_of_activations_goes_on_without_them(invoke, tmp_path):
    _, _, [(*_, settings)] = invoke("--out", str(tmp_path))
    added, identity = (
        ("mtp_inputs", "hidden_state_mixing", "distillation"),
        settings.identity(settings.corpus()),
    )
    write_checkpoint(tmp_path, {name: one for name, one in identity.items() if not name.startswith(added)})
    assert invoke("--out", str(tmp_path), "--resume")[0] == 0
    for option, words in {
        "--mtp-inputs=embeddings": "mtp_inputs is ids there, embeddings here",
        "--hidden-state-mixing": "hidden_state_mixing is False there, True here",
        "--distillation=tv": "distillation is none there, tv here",
    }.items():
        status, message, _ = invoke("--out", str(tmp_path), "--resume", option)
        assert status == 2
        assert words in message


@pytest.mark.parametrize("arguments", [["--data", ""], ["--data="]])
def test_an_empty_value_is_not_the_current_folder(invoke, tmp_path, arguments):
    status, message, started = invoke("--out", str(tmp_path), *arguments)
    assert (status, started) == (2, [])
    assert message == "error: --data must not be empty: give a value, or leave it out\n"


def test_curves_say_where_they_are(invoke, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = '{"step": 1, "lm_loss": 2, "mtp_losses": [3], "aux_loss": null, "acceptance": [0.5]}\n'
    (run / "steps.jsonl").write_text(record)
    status, output, _ = invoke("--curves", str(run), "--out", str(tmp_path / "out"))
    wrote = f"wrote {tmp_path}/out/losses.png and {tmp_path}/out/losses.md\n"
    assert (status, output.endswith(wrote)) == (0, True)


def test_checkpoints_must_be_a_folder(invoke, tmp_path):
    (tmp_path / "checkpoints").touch()
    status, message, started = invoke("--out", str(tmp_path))
    assert (status, started) == (2, [])
    assert "checkpoints must be a folder: take it away, or give another --out" in message
