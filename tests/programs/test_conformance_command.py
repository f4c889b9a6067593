"""`python -m overlap_mtp.conformance`: it survives rolls that hang or crash, and says what Megatron-LM's gets wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from overlap_mtp.training.access import reserve_port

SUPPORT = Path(__file__).parents[1] / "support"


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    return subprocess.run(
        [sys.executable, *launcher, "-m", "overlap_mtp.conformance", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def outcomes_in(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["runs"][0]["outcomes"]


@pytest.mark.slow
def test_a_roll_that_hangs_or_crashes_costs_one_case(tmp_path):
    file = tmp_path / "new" / "outcomes.json"
    names = ("--only", "zigzag, packed, ", "--deadline", "2")
    done = run("odd_rolls:odd_roll", *names, "--quick", "--json", str(file))
    assert done.returncode == 1, done.stderr
    found = {
        one["case"].removeprefix("zigzag, packed, "): (one["result"], one["detail"])
        for one in outcomes_in(file)
    }
    assert found["int32"][0] == "hung"
    assert found["uint8"] == ("crashed", "on rank 0: the process ended with status 7")
    assert found["float32"] == (
        "refused",
        "on rank 0, and others waited for it: NotImplementedError: no float32 on this rank",
    )
    assert found["bfloat16"][0] == "wrong"
    assert "a message is left unread" in found["bfloat16"][1]
    assert found["float64"] == ("refused", "on all ranks: NotImplementedError: no float64")
    assert {name for name, (result, _) in found.items() if result == "right"} == {
        *("no padded bounds", "one document", "chunks of one token", "bool", "float16", "[L]"),
        "not contiguous in memory",
    }
    assert done.stdout.endswith("\n2 ranks: 7 right, 1 wrong, 2 refused, 1 hung, 1 crashed\n")


def test_all_right_on_one_rank_and_two():
    done = run("overlap_mtp", "--ranks", "1", "2", "--only", "zigzag, d")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overlap_mtp on 1 rank, cpu" in done.stdout
    assert done.stdout.endswith("0 wrong, 0 refused, 0 hung, 0 crashed\n")


@pytest.mark.slow
def test_ranks_of_torchrun(tmp_path):
    """A target that is wrong on one rank: both know, and go on."""
    file = tmp_path / "outcomes.json"
    names = ("--only", "zigzag, packed, ", "--quick", "--deadline", "2", "--json", str(file))
    with reserve_port() as reserved:
        address = ("--master-addr", "127.0.0.1", "--master-port", str(reserved.getsockname()[1]))
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *address)
        assert run("odd_rolls:odd_roll", *names, launcher=launcher).returncode == 1
    counts = Counter(one["result"] for one in outcomes_in(file))
    assert counts == {"right": 7, "wrong": 1, "refused": 2, "hung": 1, "crashed": 1}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("megatron"), reason="needs megatron-core")
def test_what_megatron_gets_wrong(tmp_path):
    """It knows no padded documents and no contiguous layout."""
    file = tmp_path / "megatron.json"
    assert run("megatron", "--quick", "--json", str(file)).returncode == 1
    outcomes = {one["case"]: one["result"] for one in outcomes_in(file)}
    plain = (
        "dense",
        "dense, chunks of one token",
        "packed",
        "packed, one document",
        "many documents",
        "packed, bool",
    )
    assert {outcomes[f"zigzag, {one}"] for one in plain} == {"right"}
    assert outcomes["zigzag, padded"] == "wrong"
    assert outcomes["zigzag, padded, half of it padding"] == "wrong"
    assert outcomes["contiguous, dense"] == "wrong"
    assert "right" not in {result for case, result in outcomes.items() if case.startswith("contiguous")}


def test_a_target_that_cannot_be_loaded():
    done = run("nowhere:roll")
    assert done.returncode == 2
    assert "cannot load nowhere:roll: ModuleNotFoundError: No module named 'nowhere'" in done.stderr
