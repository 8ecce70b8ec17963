"""Means with bootstrap intervals, paired by seed where two arms are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "bootstrap_mean", "mean", "paired_difference"]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``num`` repeats with a percentile bootstrap interval; None with fewer than two."""

    mean: float
    num: int
    interval: tuple[float, float] | None


def mean(values: Sequence[float]) -> float:
    """Return the mean; infinities and NaN pass through as arithmetic has it, without a warning."""
    with np.errstate(invalid="ignore"):  # inf - inf
        return float(np.mean(values))


def bootstrap_mean(values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000) -> Estimate:
    """Estimate a mean; the generator is seeded, so one list of values always gives one interval.

    With non-finite values the mean is what arithmetic makes of it and there is no interval.

    Source:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13 (percentile interval).

    Raises:
        ValueError: ``values`` is empty.
    """
    if not values:
        raise ValueError("expected at least one value to take a mean of, got none")
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2 or not np.isfinite(sample).all():
        return Estimate(mean(values), len(sample), None)
    draws = np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(sample[draws].mean(axis=1), [tail, 1.0 - tail])
    return Estimate(mean(values), len(sample), (float(low), float(high)))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """Estimate ``values - baseline`` over the keys (seeds) that both have; None when they share none."""
    shared = sorted(values.keys() & baseline.keys())
    return bootstrap_mean([values[key] - baseline[key] for key in shared]) if shared else None
