"""The table of targets on records with a known answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import targets  # noqa: E402


def around(value: float, by: float) -> dict[str, float]:
    return {"value": value, "low": value - by, "high": value + by}


def record(**rows) -> dict:
    """A record of one comparison: ratio, exposed µs and efficiency of each mode."""
    return {
        "transport": {mode.replace("_", ":"): "symmetric" for mode in rows},
        "rows": {
            mode.replace("_", ":"): {"ratio": ratio, "exposed_us": exposed, "efficiency": efficiency}
            for mode, (ratio, exposed, efficiency) in rows.items()
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    steps = record(
        prefetch=(around(1.002, 0.001), around(90, 5), around(0.98, 0.005)),
        overlap=(around(1.002, 0.007), around(200, 5), None),
        none=(around(0.99, 0.005), around(0, 5), None),
    )
    (tmp_path / "h4096-dense-train.json").write_text(json.dumps(steps))
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "h4096-32-train.json").write_text(json.dumps(steps))
    latency = [
        {
            "what": "host",
            "limit": 80,
            "at_most": True,
            "value": 70.0,
            "low": 60.0,
            "high": 90.0,
            "met": False,
        },
        {
            "what": "faster",
            "limit": 20,
            "at_most": False,
            "value": 30.0,
            "low": 25.0,
            "high": 90.0,
            "met": True,
        },
    ]
    (tmp_path / "roll_latency.json").write_text(json.dumps({"targets": latency}))
    runs = [{"exchanges": 1000, "transport": "symmetric", "wrong_words": 1}]
    (tmp_path / "soak.json").write_text(json.dumps({"runs": runs}))
    return tmp_path


def test_a_target_is_met_where_its_whole_interval_is_within_the_limit(folder):
    found = {line.what: line.met for line in targets.lines_of_folder(folder)}
    assert found == {
        "prefetch (symmetric) / prepared, h4096, dense, train": True,
        "exposed µs of prefetch (symmetric), h4096, dense, train": True,
        "overlap (symmetric) / prepared, h4096, dense, train": False,  # up to 1.009
        "none / prepared, h4096, dense, train": False,  # does not hold 1
        "efficiency of prefetch (symmetric), h4096, 32, train, slow": False,
        "host": False,
        "faster": True,
        "wrong words in 1,000 exchanges (symmetric)": False,
    }


def test_the_table_names_the_command_of_each_line(folder):
    text = targets.markdown_of("here", list(targets.lines_of_folder(folder)))
    assert "## here: 3 of 8 met" in text
    assert "NCCL_NET=Socket" in text
    assert "| **no** |" in text


def test_every_target_of_the_recorded_results_can_be_read():
    lines = list(targets.lines_of_folder(ROOT / "experiments/results/2xH200"))
    assert len(lines) > 20
    assert any(line.what.startswith("prefetch (process_group) / prepared, h4096") for line in lines)
