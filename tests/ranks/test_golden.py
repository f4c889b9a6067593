"""Twenty steps of training, against recorded values: `python experiments/golden.py` computes them again."""

from __future__ import annotations

import json

import golden
import pytest

from rank_pool import run_on_forks


@pytest.mark.slow
def test_losses_and_gradient_norms_are_the_recorded_ones(monkeypatch):
    """The recorded values agree at all dimensions, and fall."""
    monkeypatch.setattr(golden, "run_on_ranks", run_on_forks)
    for documents, found in golden.compute().items():
        recorded = json.loads(golden.path_of(documents).read_text())
        changes = golden.moved(recorded, found)
        assert len(changes) == 5 * len(golden.TP_CP)
        assert max(changes.values()) <= 1e-9, changes
        first = recorded["tp 1 cp 1"]
        for values in recorded.values():
            for name, one in values.items():
                assert len(one) == golden.STEPS
                assert one == pytest.approx(first[name], rel=1e-9)
        assert all(first[name][-1] < first[name][0] for name in ("LM", "MTP 1", "MTP 2"))


def test_what_moved_is_found():
    old = {"tp 1 cp 1": {"LM": [1.0, 2.0], "aux": [1.0, 1.0]}}
    new = {"tp 1 cp 1": {"LM": [1.0, 2.2], "aux": [1.0]}, "tp 2 cp 1": {"LM": [1.0]}}
    changes = golden.moved(old, new)
    assert changes["tp 1 cp 1, LM"] == pytest.approx(0.1)
    assert changes["tp 1 cp 1, aux"] == changes["tp 2 cp 1, LM"] == float("inf")


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        (1.0, float("nan"), float("inf")),
        (float("nan"), 1.0, float("inf")),
        (float("inf"), 1.0, float("inf")),
        (float("nan"), float("nan"), 0),
        (float("inf"), float("inf"), 0),
    ],
)
def test_values_that_are_not_finite_move(old, new, change):
    """Python's max skips a NaN that is not its first value."""
    assert golden.moved({"run": {"LM": [1.0, old]}}, {"run": {"LM": [1.0, new]}}) == {"run, LM": change}


def test_last_digits_that_differ_are_counted():
    old, last = {"run": {"LM": [1.0, 2.0, float("nan")]}}, 2.0000000000000004
    assert golden.said_of(old, old) == ["every bit is the same"]
    one, two = {"run": {"LM": [1.0, last, float("nan")]}}, {"run": {"LM": [1 - 1e-16, last, float("nan")]}}
    few = "nothing moved by more than 1e-12, but"
    assert golden.said_of(old, one) == [f"{few} 1 value differs in its last digits"]
    assert golden.said_of(old, two) == [f"{few} 2 values differ in their last digits"]
    assert golden.said_of(old, {"run": {"LM": [1.0, 2.5, 3.0]}}) == ["run, LM moved by inf"]
    assert golden.said_of({}, old) == ["run, LM moved by inf"]
