"""Statistics of steps timed in interleaved rounds: what one schedule adds to another, with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
RESAMPLES = 2000
LEAST_MS = 1e-6  # a divisor below the clock's resolution counts as this much


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def _estimate(statistic: Callable[..., Times], *samples: Times, seed: int) -> list[Estimate]:
    """Estimate each row of what `statistic` returns. The bootstrap draws whole rounds, the same for all samples.

    scipy's bootstrap warns if a sample is not finite. If all rounds are the same, then so is every resample, and there
    is nothing to draw.

    Raises:
        ValueError: a sample holds a value that is not finite.
    """
    for sample in samples:
        if not np.isfinite(sample).all():
            raise ValueError(f"samples must be finite, got {sample[~np.isfinite(sample)][0]}")
    if all((sample == sample[0]).all() for sample in samples):
        return [Estimate(*3 * (float(value),)) for value in statistic(*samples, axis=-1)]
    from scipy.stats import bootstrap  # here: it takes a second, which only rank 0 needs to spend

    found = bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=seed,
    )
    values = statistic(*samples, axis=-1)
    return [Estimate(*map(float, one)) for one in zip(values, *found.confidence_interval, strict=True)]


def median(samples: Times, seed: int = 0) -> Estimate:
    """Estimate the median of independent samples.

    Args:
        samples: float64 [n].
        seed: of the resampling.

    Raises:
        ValueError: a sample is not finite.
    """
    return _estimate(lambda times, axis: np.median(times, axis)[None], samples, seed=seed)[0]


@dataclass(frozen=True)
class Comparison:
    """One schedule's steps against the baseline's (`prepared`) of the same rounds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    step_delta_us: Estimate  # median paired difference
    ratio: Estimate  # 1 + that over the baseline's median
    efficiency: Estimate | None  # 1 - step delta / step delta of `sync` (Flux, arXiv 2406.06858)


def compare(
    times_ms: dict[str, Times], baseline: str, worst: str | None, seed: int = 0
) -> dict[str, Comparison]:
    """Compare every schedule's step times with the baseline's, round by round.

    Args:
        times_ms: step times by schedule, each float64 [rounds].
        baseline: the schedule to compare with.
        worst: the schedule that efficiency is measured against, or None. There is no efficiency if the interval of
            its own step delta reaches down to 0.
        seed: of the resampling.

    Raises:
        ValueError: a time is not finite.
    """
    base = times_ms[baseline]

    def added(times: Times, base: Times, axis: int) -> Times:
        delta = np.median(times - base, axis)
        return np.stack([1000 * delta, 1 + delta / np.maximum(np.median(base, axis), LEAST_MS)])

    def efficiency(times: Times, base: Times, slow: Times, axis: int) -> Times:
        of_worst = np.maximum(np.median(slow - base, axis), LEAST_MS)
        return (1 - np.median(times - base, axis) / of_worst)[None]

    has_efficiency = worst is not None and _estimate(added, times_ms[worst], base, seed=seed)[0].low > 0
    comparisons = {}
    for name, times in times_ms.items():
        delta, ratio = _estimate(added, times, base, seed=seed)
        hidden = None
        if has_efficiency and worst is not None and name != worst:
            hidden = _estimate(efficiency, times, base, times_ms[worst], seed=seed)[0]
        p10, middle, p90 = (float(one) for one in np.percentile(times, [10, 50, 90]))
        comparisons[name] = Comparison(middle, p10, p90, delta, ratio, hidden)
    return comparisons
