"""The cost model of the exchange: its counts against real rolls, its fit on known costs, and the recorded runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scaling_model
import torch
import typer
from cost_model import SCHEDULES, Costs, IsolatedExchange, Load, Measured, Step, count, fit, nnls
from step_records import measured_in, read_records, transport_in

from overlap_mtp import SequenceLayout, make_roller

from rank_pool import device_of

ROOT = Path(__file__).parents[2]

GOLDEN = (
    Path(__file__).parents[1] / "golden" / "2xH200.json"
)  # 12 comparisons of 2026-11-22, without their times
NAMES = ("input_ids", "labels", "position_ids", "loss_mask")
COSTS = Costs(
    host_exchange_us=300,
    host_plan_us=200,
    host_document_us=2,
    host_roll_us=150,
    host_message_us=80,
    roll_us=30,
    message_us=15,
    packed_message_us=12,
    kilobyte_us=0.2,
)
LONG = Step(
    floor_us=90_000,
    forward_us=30_000,
    launch_us=9_000,
    rolled_share=0.8,
    trunk_share=0.4,
    layer_share=0.2,
)
SHORT = replace(LONG, floor_us=15_000, forward_us=5_000, launch_us=5_000)  # bound by the host


@pytest.fixture
def records(tmp_path) -> Path:
    """A folder of recorded comparisons."""
    folder = tmp_path / "2xH200"
    write(folder, json.loads(GOLDEN.read_text()))
    return folder


def write(folder: Path, records: dict) -> None:
    folder.mkdir()
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def sent_for(group, cases):
    """What this rank's rollers sent for a microbatch of each case."""
    sent = []
    for schedule, depths, documents in cases:
        size = group.size()
        layout = SequenceLayout.dense(32 * size, size)
        if documents > 1:
            layout = SequenceLayout.packed(np.arange(documents + 1) * 8 * size, size)
        ones = torch.ones(1, layout.local_len, dtype=torch.int64, device=device_of(group))
        roller = make_roller(schedule, group, depths)
        rolls = roller.start(dict.fromkeys(NAMES, ones), layout)
        for depth in range(1, depths + 1):
            rolls.at(depth)
        sent.append((roller.traffic.messages, roller.traffic.bytes))
    return sent


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_counts_are_what_the_busiest_rank_sends(pool, cp_size):
    cases = [(s, depths, documents) for s in SCHEDULES for depths in (1, 3) for documents in (1, 4)]
    by_rank = pool.run(sent_for, cp_size, cases)
    for at, (schedule, depths, documents) in enumerate(cases):
        counted = count(Load(schedule, cp_size, depths, documents))
        busiest = max(ranks[at][0] for ranks in by_rank)
        assert counted.messages == busiest, (schedule, depths, documents)
        if schedule != "sync":  # whose bytes are tokens of their own width
            assert counted.bytes == max(ranks[at][1] for ranks in by_rank), (schedule, depths, documents)


def test_counts_of_large_groups():
    assert count(Load("sync", 128, 2, 512)).messages == 2 * 4 * 2 * 512
    assert count(Load("sync", 128, 2, 512)).exchanges == 4 * 2 * 512
    dense = count(Load("prefetch", 128, 2, 1))
    assert (dense.exchanges, dense.messages) == (1, 2)
    packed = count(Load("prefetch", 128, 2, 512))
    assert packed.exchanges == 1
    assert packed.messages == 4  # chunks may be shorter than D: two neighbours on each side
    assert packed.bytes > 4 * count(Load("prefetch", 128, 2, 8)).bytes * 0.9


def test_nnls_finds_known_costs_and_no_negative_ones():
    rng = np.random.default_rng(0)
    terms = rng.uniform(0, 10, (40, 4))
    wanted = np.array([3.0, 0.0, 0.5, 7.0])
    found = nnls(terms, terms @ wanted, np.ones(40))
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    mixed = terms @ np.array([3.0, -2.0, 0.5, 7.0])
    found = nnls(terms, mixed, np.ones(40))
    assert found[1] == 0
    left = np.linalg.norm(terms @ found - mixed)
    for _ in range(200):  # nothing near it without negatives is better
        other = np.maximum(found + rng.normal(0, 0.1, 4), 0)
        assert np.linalg.norm(terms @ other - mixed) >= left
    weighted = nnls(np.ones((2, 1)), np.array([1.0, 2.0]), np.array([1.0, 1e-3]))
    assert weighted[0] == pytest.approx(2, abs=1e-4)


def measured_with(costs: Costs, held_out: set[int]) -> list[Measured]:
    """What steps of known costs would show."""
    measured = []
    for at, step in enumerate((LONG, SHORT)):
        for documents in (1, 8, 32):
            for schedule in SCHEDULES:
                load = Load(schedule, 2, 2, documents)
                exposed = costs.step_delta_us(load, step)
                interval = exposed - 20, exposed + 20
                measured.append(
                    Measured(
                        f"{at}-{documents}",
                        load,
                        step,
                        exposed,
                        *interval,
                        costs.host_us(load),
                        documents in held_out,
                    )
                )
    return measured


def alone_with(costs: Costs) -> list[IsolatedExchange]:
    """What `roll_latency` would show: a third of the host time, all of the device's."""
    found = []
    for schedule in ("merged", "prefetch"):
        for depths in (1, 2, 4, 8):
            for documents in (1, 32, 128):
                load = Load(schedule, 2, depths, documents)
                counted = count(load)
                host_us = (costs.host_us(load) - costs.host_document_us * (documents > 1) * documents) / 3
                host_us += costs.host_document_us * (documents > 1) * documents
                gpu_us = costs.device_us(load)
                found.append(
                    IsolatedExchange(load, counted.messages, counted.bytes, host_us, gpu_us, 0.05 * gpu_us)
                )
    return found


def test_the_fit_finds_the_costs_that_made_the_steps():
    found = asdict(fit(measured_with(COSTS, {32}), alone_with(COSTS)))
    for name, wanted in asdict(COSTS).items():
        # A single message's few bytes are part of what it costs.
        assert found[name] == pytest.approx(wanted, rel=0.02), name


def test_what_was_held_out_is_predicted():
    measured = measured_with(COSTS, {32})
    costs = fit(measured, [])
    for one in measured:
        if one.load.schedule != "sync" and one.load.documents == 32:
            continue  # without roll_latency nothing says what a document's plan costs
        assert costs.step_delta_us(one.load, one.step) == pytest.approx(one.step_delta_us, rel=0.05, abs=10)
    with pytest.raises(ValueError, match="no comparison to fit to"):
        fit([replace(one, held_out=True) for one in measured], [])


def test_what_is_hidden_and_what_is_not():
    slow = replace(COSTS, packed_message_us=3_000, kilobyte_us=0)
    exposed = {s: slow.step_delta_us(Load(s, 2, 2, 8), LONG) for s in SCHEDULES}
    assert exposed["merged"] == 6_000
    assert exposed["overlap"] == exposed["prefetch"] == 0
    slower = replace(slow, packed_message_us=20_000)
    assert slower.step_delta_us(Load("prefetch", 2, 2, 8), LONG) == 20_000 - 0.4 * 30_000
    assert slower.step_delta_us(Load("overlap", 2, 2, 8), LONG) == pytest.approx(
        2 * 20_000 - (0.4 + 0.2) * 30_000
    )
    # Where the host bounds the step, its time is what shows; where it does not, it is hidden up to the slack.
    load = Load("prefetch", 2, 2, 8)
    assert COSTS.step_delta_us(load, SHORT) == COSTS.host_us(load) == 300 + 200 + 2 * 8
    assert COSTS.step_delta_us(load, LONG) == 0
    sync = Load("sync", 2, 2, 32)
    assert COSTS.step_delta_us(sync, LONG) == COSTS.host_us(sync) - 0.8 * (30_000 - 9_000)
    assert 0 < COSTS.share(sync, LONG) < COSTS.share(sync, SHORT) < 1


def test_recorded_runs_that_were_held_out_are_predicted(records):
    measured = measured_in(read_records([records]), {1, 8}, "process_group")
    held_out = [one for one in measured if one.held_out]
    assert {one.load.documents for one in held_out} == {32}
    assert len(held_out) == 4 * len(SCHEDULES)
    costs = fit(measured, [])
    for one in held_out:
        predicted = costs.step_delta_us(one.load, one.step)
        if one.load.schedule == "sync":
            assert predicted == pytest.approx(one.step_delta_us, rel=0.25)
        assert abs(predicted - one.step_delta_us) < 0.1 * (one.step.floor_us + one.step_delta_us)


def test_modes_that_ran_over_another_transport_are_left_out(records):
    name = "h2048-8-train"
    record = json.loads((records / f"{name}.json").read_text())
    rows = record["rows"]
    rows["prefetch:process_group"] = rows.pop("prefetch")
    rows["prefetch"] = {**rows["merged"], "host_us": 1.0 + rows["prepared"]["host_us"]}
    record["transport"] = {
        "prefetch": "symmetric",
        "prefetch:process_group": "process_group",
        "merged": "symmetric",
    }
    assert transport_in({name: {**record, "rows": {}}}, "auto") == "process_group"
    assert transport_in({name: record}, "auto") == "symmetric"
    assert transport_in({name: record}, "process_group") == "process_group"
    symmetric, others = (
        {one.load.schedule: one for one in measured_in({name: record}, {8}, transport)}
        for transport in ("symmetric", "process_group")
    )
    assert set(symmetric) == {"sync", "merged", "prefetch"}
    assert set(others) == {"sync", "overlap", "prefetch"}
    assert symmetric["prefetch"].host_us == pytest.approx(1)
    assert others["prefetch"].host_us > 900


def test_captured_steps_are_not_fitted_to(records):
    record = json.loads((records / "h4096-dense-train.json").read_text())
    record["settings"]["captured"] = True
    (records / "h4096-dense-train-graph.json").write_text(json.dumps(record))
    (records / "other.json").write_text(json.dumps({"experiment": "soak"}))
    runs = {one.run for one in measured_in(read_records([records]), {1}, "process_group")}
    assert "2xH200/h4096-dense-train" in runs
    assert "2xH200/h4096-dense-train-graph" not in runs


def fake_latency(where: dict) -> dict:
    """A record of `roll_latency` with a microbatch of each kind, and one that failed."""
    rows = []
    for one in alone_with(COSTS):
        load = one.load
        summary = {"median": one.gpu_us, "low": one.gpu_us, "high": one.gpu_us}
        rows.append(
            {
                "schedule": load.schedule,
                "transport": "process_group",
                "cp_size": 2,
                "depths": load.depths,
                "documents": load.documents,
                "tokens": 4096,
                "failed": None,
                "host_us": {"median": one.host_us},
                "gpu_us": summary,
                "messages": one.messages,
                "bytes": one.bytes,
            }
        )
    rows.append({**rows[0], "failed": "ValueError: no"})
    rows.append({**rows[0], "cp_size": 4, "gpu_us": None})
    return {"experiment": "roll_latency", "where": where, "settings": {}, "rows": rows}


def test_scaling_model_end_to_end(records, tmp_path, capsys):
    slower = json.loads(GOLDEN.read_text())
    for record in slower.values():
        for row in record["rows"].values():
            row["step_delta_us"] = {key: 3 * value for key, value in row["step_delta_us"].items()}
    write(tmp_path / "slow", {**slower, "roll_latency": fake_latency(record["where"])})
    out = tmp_path / "out"
    scaling_model.main([records], [tmp_path / "slow"], out=out)
    assert {path.name for path in out.iterdir()} == {"scaling_model.json", "scaling_model.png"}
    result = json.loads((out / "scaling_model.json").read_text())
    said = capsys.readouterr().out
    assert "extrapolat" in said
    assert set(result["links"]) == {"fast", "slow"}
    fast_link, slow_link = result["links"]["fast"], result["links"]["slow"]
    assert fast_link["rows_of_roll_latency"] == 0
    assert fast_link["transport"] == slow_link["transport"] == "process_group"
    assert slow_link["costs"]["roll_us"] > 2 * fast_link["costs"]["roll_us"]
    assert slow_link["rows_of_roll_latency"] == 24
    assert slow_link["costs"]["packed_message_us"] == pytest.approx(COSTS.packed_message_us, rel=0.2)
    for link in result["links"].values():
        assert link["recorded_cp_sizes"] == [2]
        assert {check["set"] for check in link["checks"] if "-32-" in check["run"]} == {"held out"}
        assert {check["set"] for check in link["checks"] if "-32-" not in check["run"]} == {"fit"}
        for line in link["shares"]:
            assert line["cp_sizes"] == [2, 4, 8, 16, 32, 64, 128]
            assert all(0 <= share < 1 for share in line["shares"])
            if line["schedule"] == "sync":  # ends of the group send half of what others do
                assert line["shares"] == sorted(line["shares"])
                assert line["shares"][0] < line["shares"][1]
    assert str(ROOT) not in json.dumps(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_documents": "dense,many"}, "many"),
        ({"fit_documents": "7"}, "no comparison to fit to"),
        ({"preset": "h1"}, "no record of a training step of preset 'h1'"),
        ({"fast": [ROOT / "tests"]}, "must hold records"),
    ],
)
def test_bad_options_are_named(options, message, records, tmp_path):
    with pytest.raises(typer.BadParameter, match=message):
        scaling_model.main(**{"fast": [records], "out": tmp_path, **options})
