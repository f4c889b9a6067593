"""Estimates on numbers whose true values are known. Any warning is an error: it would end up in a user's terminal."""

from __future__ import annotations

import numpy as np
import pytest

from harness import statistics

pytestmark = pytest.mark.filterwarnings("error")


def test_comparison_finds_known_differences():
    rng = np.random.default_rng(0)
    shared = rng.normal(100, 10, 200)  # drifts of the machine that hit a whole round
    times = {
        "prepared": shared,
        "sync": shared + 2 + rng.normal(0, 0.1, 200),
        "prefetch": shared + 0.1 + rng.normal(0, 0.1, 200),
    }
    compared = statistics.compare(times, "prepared", "sync")
    sync, prefetch = compared["sync"], compared["prefetch"]
    assert sync.step_delta_us.low < 2000 < sync.step_delta_us.high
    assert prefetch.step_delta_us.low < 100 < prefetch.step_delta_us.high
    assert sync.step_delta_us.high - sync.step_delta_us.low < 100  # the pairing removes the drifts
    assert sync.ratio.value == pytest.approx(1.02, abs=0.002)
    assert sync.ratio.low < sync.ratio.value < sync.ratio.high
    assert prefetch.efficiency.value == pytest.approx(0.95, abs=0.02)
    assert prefetch.efficiency.low < 0.95 < prefetch.efficiency.high
    assert sync.efficiency is None
    assert compared["prepared"].step_delta_us.value == 0
    assert statistics.compare(times, "prepared", None)["prefetch"].efficiency is None


def test_a_worse_schedule_has_negative_efficiency():
    base = np.full(20, 10.0)
    times = {"prepared": base, "sync": base + 1, "overlap": base + 3}
    assert statistics.compare(times, "prepared", "sync")["overlap"].efficiency.value == pytest.approx(-2)


@pytest.mark.parametrize(("sync_ms", "has_efficiency"), [(0.01, False), (0.45, True)])
def test_efficiency_needs_a_sync_that_is_slower_beyond_doubt(sync_ms, has_efficiency):
    rng = np.random.default_rng(0)
    base = rng.normal(100, 1, 60)
    times = {
        "prepared": base,
        "sync": base + rng.normal(sync_ms, 1, 60),  # 0.45: some resampled differences are 0 or below
        "prefetch": base + rng.normal(0, 1, 60),
    }
    efficiency = statistics.compare(times, "prepared", "sync")["prefetch"].efficiency
    assert (efficiency is not None) == has_efficiency


@pytest.mark.parametrize("rounds", [2, 3, 40])
@pytest.mark.parametrize(
    ("base", "sync", "ratio"),
    [(10.0, 10.0, 1), (10.0, 11.0, 1.1), (0.0, 0.0, 1), (0.0, 1.0, 1 + 1e6), (1e300, 2e300, 2)],
)
def test_rounds_that_are_all_the_same_give_intervals_without_width(rounds, base, sync, ratio):
    """Also steps shorter than the clock can tell, and sums that scipy would square past the largest float."""
    times = {"prepared": np.full(rounds, base), "sync": np.full(rounds, sync), "none": np.full(rounds, base)}
    compared = statistics.compare(times, "prepared", "sync")
    found = compared["sync"].ratio
    assert (found.value, found.low, found.high) == (pytest.approx(ratio), found.value, found.value)
    assert (compared["none"].efficiency is not None) == (sync > base)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_times_that_are_no_numbers_are_refused(wrong):
    times = {"prepared": np.array([1.0, 2.0]), "sync": np.array([wrong, 2.0])}
    with pytest.raises(ValueError, match=f"must be finite, got {wrong}"):
        statistics.compare(times, "prepared", "sync")


def test_median_and_its_interval():
    hits = []
    for seed in range(40):
        samples = np.random.default_rng(seed).exponential(100, 100)
        estimate = statistics.median(samples)
        assert estimate.value == np.median(samples)
        hits.append(estimate.low < 100 * np.log(2) < estimate.high)
    assert 0.85 < np.mean(hits) < 1  # of 95 % intervals
