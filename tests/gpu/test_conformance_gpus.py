"""The conformance kit on GPUs, over NCCL: inside of ranks that run, and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from overlap_mtp.conformance import FunctionTarget, Outcome, cases_for, check_target, load_target

from mutants import MUTANTS, plain_roll
from rank_pool import RankPool

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.multi_gpu


def outcomes_of(group: dist.ProcessGroup, schedule: str) -> list[Outcome]:
    target = load_target("overlap_mtp", schedule) if schedule else FunctionTarget("plain", plain_roll())
    return check_target(target, cases_for(group.size()), group)


def outcomes_of_mutants(group: dist.ProcessGroup) -> dict[str, str]:
    """Each mutant's last outcome."""
    cases = cases_for(group.size())
    targets = [FunctionTarget(name, make()) for name, make in MUTANTS.items()]
    return {one.name: check_target(one, cases, group, stop_at_first=True)[-1].result for one in targets}


@pytest.mark.parametrize("schedule", ["", "sync", "merged", "batched", "overlap", "prefetch"])
def test_all_is_right(gpu_pool: RankPool, schedule):
    outcomes = gpu_pool.run(outcomes_of, 2, schedule)[0]
    assert [one for one in outcomes if not one.is_right] == []


def test_mutants_are_caught(gpu_pool: RankPool):
    results = gpu_pool.run(outcomes_of_mutants, 2, limit_s=300)[0]
    assert [name for name, result in results.items() if result == "right"] == []


def test_a_roll_that_hangs_or_crashes_costs_one_case(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two or more GPUs")
    file = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "overlap_mtp.conformance", "odd_rolls:odd_roll", "--device", "cuda"]
    command += ["--only", "zigzag, packed, ", "--quick", "--deadline", "10", "--json", str(file)]
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=500)
    assert done.returncode == 1
    outcomes = json.loads(file.read_text())["runs"][0]["outcomes"]
    found = {one["case"].removeprefix("zigzag, packed, "): one["result"] for one in outcomes}
    assert (found["int32"], found["uint8"], found["float32"]) == ("hung", "crashed", "refused")
    assert (found["bool"], found["float16"], found["[L]"]) == ("right", "right", "right")
