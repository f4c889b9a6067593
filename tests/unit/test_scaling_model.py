"""The cost model of the exchange: its fit on steps of known costs, and a run on the committed records."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scaling_model
from scaling_model import SCHEDULES, Measured, fit

RECORDS = Path(__file__).parents[2] / "experiments" / "results" / "step_time" / "2xH200"
COSTS = {
    "host": {"roll of sync": 150, "message of sync": 80, "microbatch": 200, "exchange": 300},
    "device": {"message of sync": 15, "blocking exchange": 60, "unroll": 9},
    "slack": {"long": 20_000.0, "short": 0.0},
}


def measured_with(costs: dict, depths: int) -> list[Measured]:
    """What steps of known costs show: a long one hides up to its slack, a short one nothing."""
    found = []
    for step in ("long", "short"):
        for schedule in SCHEDULES:
            for documents in (1, 8, 32):
                one = Measured("run", step, schedule, 2, depths, documents, 90_000.0, 0.0, 0.0, 0.0)
                host, device = (
                    float(counts @ list(costs[kind].values()))
                    for counts, kind in zip(one.counts(), ("host", "device"), strict=True)
                )
                found.append(replace(one, host_us=host, stall_us=device, step_delta_us=one.predict(costs)))
    return found


def test_the_fit_finds_the_costs_that_made_the_steps():
    measured = measured_with(COSTS, depths=2) + measured_with(COSTS, depths=4)
    costs = fit(measured)
    for kind in ("host", "device"):
        assert costs[kind] == pytest.approx(COSTS[kind], rel=1e-6)
    assert costs["slack"]["short"] == 0
    # The slack is what was seen to be free: all of it, less what the device exposes meanwhile.
    assert costs["slack"]["long"] == pytest.approx(COSTS["slack"]["long"], rel=0.1)


def test_the_fit_has_no_negative_costs():
    measured = measured_with(COSTS, depths=2)
    cheap = [replace(one, host_us=one.host_us * (0.2 if one.documents == 32 else 1)) for one in measured]
    costs = fit(cheap)
    assert all(value >= 0 for kind in costs.values() for value in kind.values())
    assert fit(measured)["host"]["message of sync"] > costs["host"]["message of sync"]


def test_the_fit_needs_records():
    with pytest.raises(ValueError, match="no record to fit to"):
        fit([])


def test_counts_of_large_groups():
    one = Measured("run", "long", "sync", 128, 2, 512, 90_000.0, 0.0, 0.0, 0.0)
    assert one.counts()[0].tolist() == [8, 2 * 4 * 2 * 512, 0, 0]
    assert replace(one, schedule="prefetch").counts()[0].tolist() == [0, 0, 1, 1]
    assert replace(one, schedule="merged").counts()[1].tolist() == [0, 4, 2]


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_model.py", *map(str, arguments)])
    scaling_model.main()


def test_committed_records_from_the_command_line(monkeypatch, tmp_path, capsys):
    fast, slow = [RECORDS / "default", RECORDS / "without-sync"], RECORDS / "nvlink-off"
    run(monkeypatch, "--fast", *fast, "--slow", slow, "--out", tmp_path)
    assert "extrapolated" in capsys.readouterr().out
    assert (tmp_path / "scaling_model.png").exists()
    links = json.loads((tmp_path / "scaling_model.json").read_text())["links"]
    assert links["fast"]["errors_of_step"]["fit"]["median"] < 0.01
    assert links["fast"]["errors_of_step"]["held out"]["largest"] < 0.05
    for link in links.values():
        assert {row["set"] for row in link["rows"] if row["documents"] in (8, 128)} == {"held out"}
        assert {row["set"] for row in link["rows"] if row["documents"] in (1, 32)} == {"fit"}
        shares = link["shares"]
        assert shares["sync, 16 documents a rank"] == sorted(shares["sync, 16 documents a rank"])
        assert 0.9 < shares["sync, 16 documents a rank"][-1] < 1
        assert 0 < shares["prefetch, 16 documents a rank"][-1] < 0.003
    assert str(RECORDS.parents[3]) not in json.dumps(links)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast", RECORDS.parents[1]], "must hold records of sweep.py"),
        ([], "--fast"),
    ],
)
def test_bad_options_are_named(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
