"""The latency of rolls: what is timed is what is meant, and a short run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import roll_latency
import torch
import typer

from harness import statistics
from latency.bench import Bench
from latency.cases import Candidate, Case, Configuration, Method, Workload, new_layout
from overlap_mtp import SequenceLayout, make_roller

from rank_pool import device_of

ROOT = Path(__file__).parents[2]

SETTINGS = roll_latency.Settings(
    depths=(1, 2, 4, 8),
    documents=(1, 8, 32, 128),
    tokens=(4096, 8192),
    cp_sizes=(),
    schedules=roll_latency.WAYS,
    transports=("process_group", "symmetric"),
    cross=False,
    rounds=60,
    slow_seconds=1.0,
    replays=200,
)


def test_packings_are_new_legal_and_padded():
    workload = Workload(cp_size=4, depths=2, documents=16, tokens=64)
    layouts = [new_layout(workload, (0, seed)) for seed in range(20)]
    assert len({layout.key for layout in layouts}) == 20
    assert {layout.seq_len for layout in layouts} == {256}
    assert {layout.num_documents for layout in layouts} == {16}
    assert new_layout(workload, (0, 3)).key == layouts[3].key  # alike on all ranks
    padded = [layout.valid_lengths < np.diff(layout.cu_seqlens) for layout in layouts]
    assert np.mean(padded) > 0.5
    assert all((layout.valid_lengths > 0).all() for layout in layouts)
    assert not new_layout(replace(workload, documents=1), (0,)).is_packed
    with pytest.raises(ValueError, match=r"documents in \[1, 32\]"):
        new_layout(replace(workload, documents=33), (0,))


def test_lines_go_through_the_base_point_and_hold_what_targets_need():
    lines = roll_latency.lines_through(SETTINGS, 4)
    base = Workload(4, 2, 8, 4096)
    assert base in lines["documents, D = 2"]
    assert base in lines["tokens"]
    workloads = roll_latency.workloads_of(SETTINGS, 4)
    assert len(workloads) == len(set(workloads)) == 11 + 4  # of 2 * 32 in the full product
    for depths in (1, 2, 4, 8):
        assert {Workload(4, depths, 1, 4096), Workload(4, depths, 32, 4096)} <= set(workloads)
    assert {workload.documents for workload in workloads if workload.cp_size == 2} == {1, 8, 32, 128}
    assert {workload.cp_size for workload in roll_latency.workloads_of(SETTINGS, 2)} == {2}
    assert len(roll_latency.workloads_of(replace(SETTINGS, cross=True), 2)) == 32


def test_ways_leave_out_what_is_missing():
    missing = {"symmetric": "no such transport", "megatron": "no module"}
    methods = roll_latency.methods_for(Workload(2, 2, 8, 64), SETTINGS, missing)
    assert [str(method) for method in methods] == [
        "sync",
        "merged process_group",
        "overlap process_group",
        "prefetch process_group",
        "prepared",
    ]
    assert len(roll_latency.methods_for(Workload(2, 2, 8, 64), SETTINGS, {})) == 10
    assert (
        len(roll_latency.methods_for(Workload(2, 2, 1, 64), SETTINGS, {})) == 9
    )  # a dense roll has no cu_seqlens


def row(schedule, transport, host, wall, depths=2, documents=1, gpu=None):
    def summary(value):
        return {"median": value, "low": 0.99 * value, "high": 1.01 * value, "p10": value, "p90": value}

    return {
        "schedule": schedule,
        "transport": transport,
        "cp_size": 2,
        "depths": depths,
        "documents": documents,
        "tokens": 4096,
        "failed": None,
        "host_us": summary(host),
        "wall_us": summary(wall),
        "gpu_us": None if gpu is None else summary(gpu),
    }


def test_median_and_its_interval():
    hits = []
    for seed in range(40):
        samples = np.random.default_rng(seed).exponential(100, 100)
        estimate = statistics.median(samples)
        assert estimate.value == np.median(samples)
        hits.append(estimate.low < 100 * np.log(2) < estimate.high)
    assert 0.85 < np.mean(hits) < 1  # of 95 % intervals


def differences_of_wrong_rolls(group):
    """What the check says of right rolls, of rolls by one too few, and of rolls that keep the padding."""
    workload = Workload(group.size(), 2, 4, 32)
    case = Case(workload, group, device_of(group), seed=1)
    roller = make_roller("prefetch", group, num_depths=2)
    right = roller.start(case.batch, case.layout)
    unpadded = SequenceLayout.packed(case.layout.cu_seqlens, group.size())
    keeping = make_roller("prefetch", group, num_depths=2).start(case.batch, unpadded)

    class Late:
        def at(self, depth):
            return case.batch if depth == 1 else right.at(depth - 1)

    return case.differences(right), case.differences(Late()), case.differences(keeping)


def test_the_check_of_bits_can_fail(pool):
    for right, late, keeping in pool.run(differences_of_wrong_rolls, 2):
        assert right == (0, 0)
        assert late[1] > 100
        assert keeping[0] > 0
        assert keeping[1] == 0


class FailingRoller:
    """Raises on one rank, at a given roll."""

    def __init__(self, roller, at_roll):
        self.roller, self.left = roller, at_roll
        self.traffic = roller.traffic

    def start(self, batch, layout):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("/some/folder/of/this/machine/file.py broke\nand more")
        return self.roller.start(batch, layout)

    def close(self):
        self.roller.close()


def bench_with_a_failure(group):
    workload = Workload(group.size(), 2, 4, 32)
    methods = [Method("prepared"), Method("prefetch", "process_group"), Method("sync", "nonsense")]
    bench = Bench([Configuration(workload, method) for method in methods], device_of(group))
    prepared = bench.candidates[0]
    opening = prepared.open

    def open_failing():
        opening()
        if group.rank() == 1:
            prepared.roller = FailingRoller(prepared.roller, 1 + 3 + 2 * 6 + 1)

    prepared.open = open_failing
    bench.prepare(rounds=4, slow_seconds=10)
    bench.run(4)
    bench.close()
    return [(candidate.failed, len(candidate.host_us), candidate.wall_us) for candidate in bench.candidates]


def test_one_failure_does_not_end_the_others(pool):
    first, second = pool.run(bench_with_a_failure, pool.world_size)[:2]
    assert first[0][0] == second[0][0] == "RuntimeError: file.py broke"
    assert second[0][1] == 2  # 1 check, 3 warm-ups, 2 rounds of 6; the next roll failed
    assert first[1][:2] == second[1][:2] == (None, 4)
    assert first[2][0].startswith("ValueError: transport must be one of")
    assert all(wall > 0 for wall in first[1][2])


def test_slow_configurations_sit_out_rounds_evenly():
    from latency.bench import _is_due

    candidate = Candidate(Configuration(Workload(2, 2, 8, 64), Method("sync")), case=None, rounds=5)  # type: ignore[arg-type]
    due = [index for index in range(60) if _is_due(candidate, index, 60)]
    assert due == [11, 23, 35, 47, 59]


def megatron_against_oracle(group):
    from latency import megatron_rolls

    found = {}
    for documents in (1, 4):
        workload = Workload(group.size(), 3, documents, 64)
        case = Case(workload, group, device_of(group), seed=documents)
        for where in megatron_rolls.WHERE:
            roller = megatron_rolls.MegatronRoller(group, where, torch.device("cpu"))
            rolls = roller.start(case.batch, roller.argument(case.layout))
            found[documents, where] = case.differences(rolls)
    return found


def test_megatron_differs_from_the_oracle_at_padding_only(pool):
    pytest.importorskip("megatron.core")
    for cp_size in (2, 4):
        for found in pool.run(megatron_against_oracle, cp_size):
            assert found[1, "host"] == found[1, "device"] == (0, 0)
            assert found[4, "host"] == found[4, "device"]
            assert found[4, "host"][1] == 0
        assert any(found[4, "host"][0] for found in pool.run(megatron_against_oracle, cp_size))


def run_latency(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "experiments/roll_latency.py", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_roll_latency_end_to_end(tmp_path):
    sizes = ["--tokens", "64", "--documents", "1,8", "--depths", "1,2", "--rounds", "3"]
    transports = ["--transports", "process_group,pigeon"]
    done = run_latency("--ranks", "2", *sizes, *transports, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "skipped: pigeon (transport must be one of" in done.stdout
    result = json.loads((tmp_path / "roll_latency.json").read_text())
    assert "pigeon" in result["skipped"]
    rows = {
        (one["schedule"], one["depths"], one["documents"]): one
        for one in result["rows"]
        if one["transport"] != "device"
    }
    for schedule in ("sync", "merged", "overlap", "prefetch", "prepared"):
        for depths in (1, 2):
            for documents in (1, 8):
                one = rows[schedule, depths, documents]
                assert one["failed"] is None
                assert one["rounds"] == 3
                assert one["differing_slots"] == 0
                assert 0 < one["host_us"]["median"] <= one["wall_us"]["median"]
                assert one["wall_us"]["p10"] <= one["wall_us"]["median"] <= one["wall_us"]["p90"]
                assert one["gpu_us"] is None
    # 4 tensors, 2 depths; each of two ranks sends to the other, once a dense document or more often
    assert rows["prefetch", 2, 8]["messages"] == 1
    assert rows["merged", 2, 8]["messages"] == rows["overlap", 2, 8]["messages"] == 2
    assert rows["sync", 2, 1]["messages"] == 8
    assert rows["sync", 2, 8]["messages"] > 32
    assert rows["prepared", 2, 8]["messages"] == 0
    assert rows["prefetch", 2, 1]["bytes"] < rows["prefetch", 2, 8]["bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"roll_latency.json", "roll_latency.png"}
    text = json.dumps(result)
    for secret in (socket.gethostname(), str(Path.home()), str(ROOT)):
        assert secret not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": "sync,fast"}, "schedules must be among"),
        ({"depths": "1,two"}, "depths must be comma-separated whole numbers above 0"),
        ({"documents": "0"}, "documents must be comma-separated whole numbers above 0"),
        ({"cp_sizes": "3"}, "cp-sizes must divide the number of ranks 2"),
        ({"tokens": "64", "documents": "100"}, r"documents in \[1, 32\]"),
        ({"tokens": "63", "documents": "4"}, "tokens must be even"),
        ({"ranks": 4, "tokens": "64", "documents": "33"}, r"documents in \[1, 32\]"),
    ],
)
def test_bad_arguments_are_said_before_ranks_start(options, message):
    with pytest.raises(typer.BadParameter, match=message):
        roll_latency.main(device="cpu", **options)
