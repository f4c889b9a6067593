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


SLOW = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}


def record(environment: dict[str, str], **rows) -> dict:
    """A record of one comparison: ratio, exposed µs and efficiency of each mode."""
    return {
        "where": {"environment": environment},
        "settings": {"rounds": 9, "modes": list(rows), "captured": False, "compiled": False},
        "transport": {mode.replace("_", ":"): "symmetric" for mode in rows},
        "rows": {
            mode.replace("_", ":"): {"ratio": ratio, "exposed_us": exposed, "efficiency": efficiency}
            for mode, (ratio, exposed, efficiency) in rows.items()
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def steps(environment: dict[str, str], by: float = 0.001) -> str:
        return json.dumps(
            record(
                environment,
                prefetch=(around(1.002, by), around(90, 5), around(0.98, 0.005)),
                overlap=(around(1.002, 0.007), around(200, 5), None),
                none=(around(0.99, 0.005), around(0, 5), None),
            )
        )

    for name, environment in (
        ("slow", SLOW),
        ("second", {}),
        ("queue", {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "h4096-32-train.json").write_text(steps(environment))
    (tmp_path / "h4096-32-train.json").write_text(steps({}, by=0.007))
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
    found = {(line.target, line.case, line.launch): line.met for line in targets.lines_of_folder(folder)}
    steps, exposed = "prefetch / prepared, h4096 train", "exposed µs of prefetch, h4096"
    assert found == {
        (steps, "32 documents (symmetric)", "."): False,  # up to 1.009
        (steps, "32 documents (symmetric)", "second"): True,
        (steps, "32 documents, one connection (symmetric)", "queue"): True,
        **{
            (exposed, f"train, 32 documents{what} (symmetric)", launch): True
            for what, launch in (("", "."), ("", "second"), (", one connection", "queue"))
        },
        **{
            ("overlap / prepared, h4096 train", f"32 documents{what} (symmetric)", launch): False
            for what, launch in (("", "."), ("", "second"), (", one connection", "queue"))
        },
        **{
            ("none / prepared", f"h4096, train, 32 documents{what}", launch): False  # does not hold 1
            for what, launch in (("", "."), ("", "second"), (", one connection", "queue"))
        },
        (
            "overlap efficiency of prefetch on a slow link",
            "h4096, train, 32 documents, slow link (symmetric)",
            "slow",
        ): False,
        ("rolls alone (roll_latency)", "host", "."): False,
        ("rolls alone (roll_latency)", "faster", "."): True,
        ("soak: wrong words", "1,000 exchanges (symmetric)", "."): False,
    }


def test_a_case_is_met_when_all_its_launches_are(folder):
    text = targets.markdown_of("here", list(targets.lines_of_folder(folder)))
    assert "## here: 4 of 12 cases met" in text
    assert "| prefetch / prepared, h4096 train | <= 1.004 | 1 of 2 |" in text
    (line,) = [one for one in text.splitlines() if one.startswith("| 32 documents (symmetric) | <= 1.004")]
    assert "(second) | 1 of 2 | `python experiments/sweep.py --presets h4096 --documents 32" in line
    assert "`NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket python experiments/sweep.py" in text
    assert "| **no** |" in text


def test_every_target_of_the_recorded_results_can_be_read():
    lines = list(targets.lines_of_folder(ROOT / "experiments/results/2xH200"))
    assert len(lines) > 20
    assert any(
        line.target == "prefetch / prepared, h4096 train" and line.launch == "second" for line in lines
    )
