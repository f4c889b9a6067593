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


def test_median_and_its_interval():
    hits = []
    for seed in range(40):
        samples = np.random.default_rng(seed).exponential(100, 100)
        estimate = statistics.median(samples)
        assert estimate.value == np.median(samples)
        hits.append(estimate.low < 100 * np.log(2) < estimate.high)
    assert 0.85 < np.mean(hits) < 1  # of 95 % intervals
