"""The conformance kit says in plain words which option or target makes no sense."""

from __future__ import annotations

import re

import pytest
import torch

from overlap_mtp import SequenceLayout
from overlap_mtp.conformance import load_target
from overlap_mtp.conformance.__main__ import main
from overlap_mtp.conformance.targets import packed_seq_params

from megatron_ranks import needs_megatron


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "striped"], "--only 'striped' is in the name of no case"),
        (["--ranks", "2", "0"], "--ranks must be at least 1, got 0"),
        (["--deadline", "0"], "--deadline must be positive, got 0"),
        (["--deadline", "nan"], "--deadline must be positive, got nan"),
    ],
)
def test_illegal_options(capsys, arguments, text):
    with pytest.raises(SystemExit) as end:
        main(["overlap_mtp", *arguments])
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_ranks_are_torchrun_s(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        main(["overlap_mtp", "--ranks", "2"])
    assert "--ranks starts ranks, and torchrun has done so: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "schedule", "text"),
    [
        ("nothing", "sync", "TARGET must be megatron, overlap_mtp or module:function, got 'nothing'"),
        ("math:", "sync", "TARGET must be megatron, overlap_mtp or module:function, got 'math:'"),
        ("math:roll", "sync", "cannot load math:roll: AttributeError: module 'math' has no attribute 'roll'"),
        ("math:pi", "sync", "math:pi must be a function, got a float"),
        (
            "overlap_mtp",
            "late",
            "schedule must be one of sync, merged, batched, overlap, prefetch, got 'late'",
        ),
        (
            "overlap_mtp",
            "prepared",
            "schedule must be one of sync, merged, batched, overlap, prefetch, got 'prepared'",
        ),
    ],
)
def test_targets_that_are_none(target, schedule, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        load_target(target, schedule)


def test_documents_are_told_as_megatron_does():
    layout = SequenceLayout.packed([0, 8, 8, 24], 2, valid_lengths=[5, 0, 16])
    cpu = torch.device("cpu")
    assert packed_seq_params(layout, "none", cpu) is None
    padded = packed_seq_params(layout, "padded", cpu)
    assert padded.cu_seqlens_q.tolist() == [0, 5, 5, 21]
    assert padded.cu_seqlens_q_padded.tolist() == [0, 8, 8, 24]
    assert (padded.cu_seqlens_q.dtype, padded.max_seqlen_q, padded.qkv_format) == (torch.int32, 16, "thd")
    same = packed_seq_params(layout, "same", cpu)
    assert same.cu_seqlens_q is same.cu_seqlens_q_padded
    assert packed_seq_params(layout, "unpadded", cpu).cu_seqlens_q_padded is None


@needs_megatron
def test_megatrons_roll_finds_no_gpu_on_cpu_ranks(monkeypatch):
    """Its dense roll receives into tensors on the current GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    load_target("megatron", device="cuda")
    assert torch.cuda.current_device() == 0
    load_target("megatron", device="cpu")
    assert torch.cuda.current_device() == torch.device("cpu")
