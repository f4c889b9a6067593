"""Loss curves of runs that were to be alike, and of runs that were not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.curves import draw_losses

SETTINGS = {
    "model": {"hidden_size": 8},
    "recipe": {"steps": 3, "accumulate": 2},
    "sizes": {"dp": 1, "cp": 2, "tp": 1},
    "seq_len": 64,
    "num_documents": None,
    "token_dtype": "uint16",
    "seed": 0,
}
IDENTITY = {"hidden_size": 8, "recipe.steps": 3, "dp * accumulate": 2, "data": "1 document, abc", "seed": 0}


def write_run(
    folder: Path, losses: list[float], identity: dict | None = None, device: str = "CPU", **settings
) -> Path:
    folder.mkdir()
    record = {"settings": SETTINGS | settings, "where": {"device": device}}
    (folder / "run.json").write_text(json.dumps(record | ({"identity": identity} if identity else {})))
    steps = [
        {"step": step, "lm_loss": loss, "mtp_losses": [loss + 1, None], "aux_loss": None}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def test_means_and_differences_are_those_of_the_steps_that_all_have(tmp_path):
    runs = [
        write_run(tmp_path / "a", [3.0, 2.0, 1.0], IDENTITY),
        write_run(tmp_path / "b", [3.0, 2.5], IDENTITY),
        write_run(tmp_path / "c", [3.0, 2.0, 1.0], IDENTITY, sizes={"dp": 2, "cp": 1, "tp": 1}),
    ]
    table = draw_losses(runs, tmp_path / "out")
    assert table == (tmp_path / "out/losses.md").read_text()
    assert table.startswith("Means of steps 1 to 2, ")
    assert "| `a` | 2.5000 | 3.5000 | - |" in table  # where no token counts
    assert "| `b` (2 steps) | 2.7500 (0.5) | 3.7500 (0.5) | - |" in table
    assert "| `c` | 2.5000 (0, every bit) | 3.5000 (0, every bit) | - |" in table
    assert "not of one kind" not in table
    assert (tmp_path / "out/losses.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            {"identity": IDENTITY | {"data": "1 document, xyz"}},
            "- data: 1 document, abc in `a`, 1 document, xyz in `b`",
        ),
        ({"identity": IDENTITY | {"hidden_size": 16}}, "- hidden_size: 8 in `a`, 16 in `b`"),
        ({"identity": IDENTITY, "device": "a GPU"}, "- device: CPU in `a`, a GPU in `b`"),
        ({"sizes": {"dp": 2, "cp": 1, "tp": 1}}, "- dp * accumulate: 2 in `a`, 4 in `b`"),  # an older record
        ({"seed": 1}, "- seed: 0 in `a`, 1 in `b`"),
    ],
)
def test_runs_of_another_kind_are_said_to_be(tmp_path, other, line):
    runs = [write_run(tmp_path / "a", [1.0], IDENTITY), write_run(tmp_path / "b", [1.0], **other)]
    table = draw_losses(runs, tmp_path / "out")
    assert table.split("These runs are not of one kind:")[1].split("\n\n")[1].strip() == line


def test_runs_without_steps_or_with_one_name_are_refused(tmp_path):
    run = write_run(tmp_path / "a", [1.0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no steps\.jsonl with steps of a run"):
        draw_losses([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="two are alike"):
        draw_losses([run, run], tmp_path / "out")
