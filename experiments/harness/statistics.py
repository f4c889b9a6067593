"""Statistics of steps timed in interleaved rounds: what one schedule adds to another, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: Times) -> Estimate:
        low, high = np.percentile(samples, [2.5, 97.5])
        return cls(float(value), float(low), float(high))


def median(samples: Times, seed: int = 0) -> Estimate:
    """The median of independent samples."""
    draws = np.random.default_rng(seed).integers(0, samples.size, (RESAMPLES, samples.size))
    return Estimate.of(float(np.median(samples)), np.median(samples[draws], axis=1))


@dataclass(frozen=True)
class Comparison:
    """One schedule's steps against the baseline's (`prepared`) of the same rounds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    step_delta_us: Estimate  # median paired difference
    ratio: Estimate  # 1 + that over the baseline's median
    efficiency: Estimate | None  # 1 - exposed / exposed of sync (Flux, arXiv 2406.06858)


def compare(
    times_ms: dict[str, Times], baseline: str, worst: str | None, seed: int = 0
) -> dict[str, Comparison]:
    """Compares every schedule's step times [rounds] with the baseline's, round by round.

    The bootstrap draws whole rounds, the same for all schedules, so that intervals are of paired differences.
    `worst` is the schedule that efficiency is measured against, where it ran; there is no efficiency where what
    it exposes is not above 0 beyond doubt.
    """
    rounds = len(times_ms[baseline])
    draws = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    draws = np.concatenate([np.arange(rounds)[None], draws])  # the first row: the sample itself
    added = {name: np.median((t - times_ms[baseline])[draws], axis=1) for name, t in times_ms.items()}
    floor = np.median(times_ms[baseline][draws], axis=1)
    worst_exposes = worst is not None and np.percentile(added[worst], 2.5) > 0
    comparisons = {}
    for name, times in times_ms.items():
        efficiency = None
        if worst_exposes and worst is not None and name != worst:
            samples = 1 - added[name] / np.maximum(added[worst], np.finfo(np.float64).tiny)
            efficiency = Estimate.of(samples[0], samples)
        ratios = 1 + added[name] / floor
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        comparisons[name] = Comparison(
            float(median),
            float(p10),
            float(p90),
            Estimate.of(1000 * added[name][0], 1000 * added[name]),
            Estimate.of(ratios[0], ratios),
            efficiency,
        )
    return comparisons
