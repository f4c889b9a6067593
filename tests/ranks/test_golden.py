"""Twenty steps of training, against recorded values: `python experiments/golden.py` makes them anew."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest

from rank_pool import run_on_forks

ROOT = Path(__file__).parents[2]

TOLERANCE = 1e-9
RUNS = [(documents, f"tp {tp} cp {cp}") for documents in golden.DOCUMENTS for tp, cp in golden.SIZES]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, golden.Values]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(golden, "run_on_ranks", run_on_forks)
        return golden.compute()


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "sizes"), RUNS)
def test_losses_and_gradient_norms_are_the_recorded_ones(found, documents, sizes):
    recorded = json.loads(golden.path_of(documents).read_text())
    changes = golden.moved({sizes: recorded[sizes]}, {sizes: found[documents][sizes]})
    assert len(changes) == 5
    assert max(changes.values()) <= TOLERANCE, changes


@pytest.mark.parametrize("documents", golden.DOCUMENTS)
def test_the_recorded_values_are_alike_at_all_sizes_and_fall(documents):
    recorded = json.loads(golden.path_of(documents).read_text())
    first = recorded["tp 1 cp 1"]
    assert len(recorded) == len(golden.SIZES)
    for values in recorded.values():
        assert {len(one) for one in values.values()} == {golden.STEPS}
        for name, one in values.items():
            assert one == pytest.approx(first[name], rel=1e-9)
    assert all(first[name][-1] < first[name][0] for name in ("LM", "MTP 1", "MTP 2"))


def test_what_moved_is_found():
    old = {"tp 1 cp 1": {"LM": [1.0, 2.0], "aux": [1.0, 1.0]}}
    new = {"tp 1 cp 1": {"LM": [1.0, 2.2], "aux": [1.0]}, "tp 2 cp 1": {"LM": [1.0]}}
    changes = golden.moved(old, new)
    assert changes["tp 1 cp 1, LM"] == pytest.approx(0.1)
    assert changes["tp 1 cp 1, aux"] == changes["tp 2 cp 1, LM"] == float("inf")
