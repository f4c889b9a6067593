"""Loss curves of runs that should agree, and of runs that should not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.plots import subplots
from training import curves
from training.curves import draw_losses

IDENTITY = {
    "hidden_size": 8,
    "train_config.steps": 3,
    "dp * accumulate": 2,
    "data": "1 document, abc",
    "seed": 0,
}


def write_run(folder: Path, losses: list[float | None], device: str = "CPU", **identity) -> Path:
    folder.mkdir()
    record = {"identity": IDENTITY | identity, "where": {"device": device}}
    (folder / "run.json").write_text(json.dumps(record))
    steps = [
        {
            "step": step,
            "lm_loss": loss,
            "mtp_losses": [loss and loss + 1, None],
            "aux_loss": None,
            "acceptance": [loss and loss / 8, None],
        }
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def test_means_and_differences_are_those_of_the_steps_that_all_have(tmp_path):
    losses = {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.5], "c": [3.0, 2.0, 1.0]}
    runs = [write_run(tmp_path / name, values) for name, values in losses.items()]
    table = draw_losses(runs, tmp_path / "out")
    assert table == (tmp_path / "out/losses.md").read_text()
    assert table.startswith("Means of steps 1 to 2, ")
    assert "| run | LM | MTP depth 1 | MTP depth 2 | accepted at depth 1 | accepted at depth 2 |" in table
    assert "| `a` | 2.5000 | 3.5000 | - | 0.3125 | - |" in table  # no token counts
    assert "| `b` (2 steps) | 2.7500 (0.5) | 3.7500 (0.5) | - | 0.3438 (0.062) | - |" in table
    same = "0, every bit"
    assert f"| `c` | 2.5000 ({same}) | 3.5000 ({same}) | - | 0.3125 ({same}) | - |" in table
    assert "settings" not in table
    assert (tmp_path / "out/losses.png").stat().st_size > 1000


def test_shares_of_drafts_are_percent_with_the_digits_that_they_need(tmp_path, monkeypatch):
    drawn = []

    def kept(*size, **options):
        drawn.append(subplots(*size, **options))
        return drawn[-1]

    monkeypatch.setattr(curves, "subplots", kept)
    draw_losses([write_run(tmp_path / "a", [3.0, 2.0])], tmp_path / "out")
    [(_, [[*_, axes]])] = drawn
    formatter = axes.yaxis.get_major_formatter()
    shown = [formatter(share, 0) for share in (0, 0.025, 0.05, 0.075, 0.1 + 0.2, 0.1225, 1)]
    assert shown == ["0%", "2.5%", "5%", "7.5%", "30%", "12.25%", "100%"]


def test_steps_in_which_no_token_counts_hide_no_difference(tmp_path):
    losses = {"a": [None, 2.0, 1.0], "b": [None, 2.0, 1.5], "c": [3.0, 2.0, 1.0], "d": [None, 2.0, 1.0]}
    table = draw_losses([write_run(tmp_path / name, run) for name, run in losses.items()], tmp_path / "out")
    cells = [line.split(" | ")[1] for line in table.splitlines()[4:8]]
    assert cells == ["1.5000", "1.7500 (0.5)", "2.0000 (inf)", "1.5000 (0, every bit)"]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"data": "1 document, xyz"}, "- data: 1 document, abc in `a`, 1 document, xyz in `b`"),
        ({"hidden_size": 16}, "- hidden_size: 8 in `a`, 16 in `b`"),
        ({"device": "a GPU"}, "- device: CPU in `a`, a GPU in `b`"),
    ],
)
def test_settings_that_differ_are_listed(tmp_path, other, line):
    runs = [write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [1.0], **other)]
    table = draw_losses(runs, tmp_path / "out")
    assert table.split("The settings of these runs differ:")[1].strip() == line


def test_runs_without_steps_or_with_one_name_are_refused(tmp_path):
    run = write_run(tmp_path / "a", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no steps\.jsonl with steps of a run"):
        draw_losses([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="two of the same name"):
        draw_losses([run, run], tmp_path / "out")
