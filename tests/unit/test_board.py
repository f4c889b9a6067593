"""What a run writes for TensorBoard, which need not be installed."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from training.board import Board, check_tensorboard


def test_every_number_of_a_record_is_written_and_a_resumed_run_drops_later_steps(monkeypatch, tmp_path):
    made, written = [], []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            made.append((folder, purge_step))

        def add_scalar(self, *arguments) -> None:
            written.append(arguments)

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = Board(tmp_path, 4)
    record = {
        "step": 5,
        "lm_loss": 2.5,
        "mtp_losses": [3.5, None],
        "aux_loss": None,
        "grad_norms": {"model": 0.5},
    }
    board.write(record)
    board.close()
    assert made == [(str(tmp_path), 5)]
    losses = [("lm_loss", 2.5, 5), ("mtp_losses/depth 1", 3.5, 5), ("grad_norms/model", 0.5, 5)]
    assert written == [*losses, "closed"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package tensorboard: pip install"):
        check_tensorboard()
