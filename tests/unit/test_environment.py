"""The command in a record: as one would type it, without whole paths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness import environment


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["experiments/x.py"], "python experiments/x.py"),
        (["/home/me/repo/experiments/x.py", "--rounds", "4"], "python experiments/x.py --rounds 4"),
        (["x.py", "--out", "/home/me/secret/out"], "python experiments/x.py --out out"),
        (["x.py", "--out=/home/me/secret/out"], "python experiments/x.py --out=out"),
        (
            ["x.py", "--out", "out/here", "--data=~/text"],
            "python experiments/x.py --out out/here --data=text",
        ),
        (["x.py", "--data", "a b;c"], "python experiments/x.py --data 'a b;c'"),
        (["x.py", "--files", "/a/b.json,c/d,/e/f"], "python experiments/x.py --files b.json,c/d,f"),
        (["x.py", "--out", f"{Path.cwd()}/out/x"], "python experiments/x.py --out out/x"),
    ],
)
def test_command(typed, recorded, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", typed)
    assert environment.command() == recorded


@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [("8", "torchrun --nproc-per-node 8"), ("16", "torchrun --nnodes 2 --nproc-per-node 8")],
)
def test_command_under_torchrun(ranks, launcher, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["experiments/x.py", "--wide"])
    assert environment.command() == f"{launcher} experiments/x.py --wide"
