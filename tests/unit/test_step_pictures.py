"""Several records of Megatron-LM's steps in one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import megatron_step
import pytest

from dropin import report
from harness import plots

RECORDS = Path(__file__).parents[2] / "experiments/results/megatron/4xH200"
DROP_IN, OWN_ROLLS = (RECORDS / name / "results.json" for name in ("h4096", "h4096-own-rolls"))


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command with `--draw`: its exit status and what it says."""
    monkeypatch.setattr(megatron_step, "run_on_ranks", lambda *_: pytest.fail("ranks were started"))
    for name, value in megatron_step.VARIABLES.items():
        monkeypatch.setenv(name, value)  # so that main leaves none behind

    def call(*records):
        options = [word for record in records for word in ("--draw", str(record))]
        monkeypatch.setattr(sys, "argv", ["megatron_step", "--out", str(tmp_path), *options])
        try:
            megatron_step.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call


def test_two_records_are_drawn_as_ratios(draw, monkeypatch, tmp_path):
    figures = []
    subplots = plots.subplots
    monkeypatch.setattr(plots, "subplots", lambda *size: figures.append(subplots(*size)) or figures[-1])
    assert draw(DROP_IN, OWN_ROLLS) == (0, f"wrote {tmp_path / 'step_time.png'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["step_time.png"]
    [(_, [[axes]])] = figures
    assert "prefetch over symmetric" in axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "dense",
        *(f"{count} documents" for count in (8, 32, 128)),
    ]
    bars = {one.get_label(): list(one) for one in axes.containers if one.get_label() in report.MODES}
    for mode, path in (("megatron", OWN_ROLLS), ("megatron_host", OWN_ROLLS), ("dropin", DROP_IN)):
        runs = json.loads(path.read_text())["runs"]
        rows = [runs[name]["rows"]["events_ms"] for name in ("dense", "8", "32", "128") if name in runs]
        ratios = [one[mode]["ratio"]["value"] for one in rows if mode in one]
        assert [bar.get_height() for bar in bars[mode]] == ratios
    assert set(bars) == {"megatron", "megatron_host", "dropin"}
    middle = {mode: [bar.get_center()[0] for bar in some] for mode, some in bars.items()}
    assert middle["dropin"][3] == pytest.approx(3)  # alone in its group
    assert middle["megatron_host"] == pytest.approx([1, 2])  # between two others
    assert middle["megatron"][0] + middle["dropin"][0] == pytest.approx(0)


def test_only_records_of_the_same_step_share_a_picture(draw, tmp_path):
    assert draw(DROP_IN, RECORDS / "h2048/results.json") == (
        2,
        f"error: {DROP_IN} and {RECORDS / 'h2048/results.json'} must agree in preset, tokens_per_rank to share a "
        "picture\n",
    )
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert draw(DROP_IN, other) == (
        2,
        f"error: {other} is not a record of megatron_step, which writes results.json\n",
    )
    assert not (tmp_path / "step_time.png").exists()
