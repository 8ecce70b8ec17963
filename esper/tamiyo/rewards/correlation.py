"""Which parts of a reward, and how early, tell how a run ends: rank correlations over stored experiences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS, Horizon
from esper.tamiyo.rewards.reward import Reward

__all__ = ["LEAST_COUNT", "ComponentCorrelation", "correlations", "spearman"]

_Array = NDArray[np.float64]
LEAST_COUNT = 5
"""Experiences below which a rank correlation is not worth its name: two always agree or disagree wholly."""
_FEWEST = 3
"""Things to resample; fewer tell nothing of a spread."""


@dataclass(frozen=True)
class ComponentCorrelation:
    """How one component up to one horizon goes with the final utility.

    Attributes:
        component: Of :data:`~esper.tamiyo.rewards.config.COMPONENTS`, or ``total``.
        horizon: Of the component.
        rho: Spearman's rank correlation; None where the component or the outcome never differs, and for fewer than
            :data:`LEAST_COUNT` experiences.
        low, high: Bootstrap interval; None as ``rho``, or where no resample told anything.
        count: Experiences.
        num_runs: Runs that they come from.
    """

    component: str
    horizon: Horizon
    rho: float | None
    low: float | None
    high: float | None
    count: int
    num_runs: int


def correlations(
    rewards: Iterable[tuple[str, Reward]], *, level: float = 0.95, num_resamples: int = 500, seed: int = 0
) -> list[ComponentCorrelation]:
    """Correlate every component at every horizon with the utility at the end of the run.

    Only experiences whose furthest horizon is over count, and no WAIT, which earns nothing by definition. The
    utility is the long horizon's, so accuracy there goes with it by construction; what the short and
    medium ones are worth is the question. Whole runs are resampled, because decisions of one run are not independent;
    where there is one run only, its decisions are.

    Args:
        rewards: Run id and reward of each experience.
        level: Probability of the bootstrap's percentile interval.
        num_resamples: Of the bootstrap.
        seed: Of its random numbers.
    """
    last = HORIZONS[-1]
    rows = [(run, r) for run, r in rewards if last in r.horizons and r.provenance != "itself"]
    runs = [run for run, _ in rows]
    final = np.array([r.horizons[last].utility for _, r in rows])
    names = (*COMPONENTS, "total")
    found = []
    for horizon in HORIZONS:
        kept = [i for i, (_, r) in enumerate(rows) if horizon in r.horizons]
        groups = [runs[i] for i in kept]
        values = np.array([[_value(rows[i][1], horizon, name) for i in kept] for name in names])
        bounds = _bootstrap(values, final[kept], groups, level, num_resamples, seed)
        for name, x, (low, high) in zip(names, values, bounds, strict=True):
            rho = spearman(x, final[kept]) if len(kept) >= LEAST_COUNT else None
            bounded = (None, None) if rho is None else (low, high)
            found.append(ComponentCorrelation(name, horizon, rho, *bounded, len(kept), len(set(groups))))
    return found


def spearman(x: _Array, y: _Array) -> float | None:
    """Rank correlation of ``x`` [N] and ``y`` [N], ties by their mean rank; None where it is not defined."""
    rho = _spearman(x[None], y)[0] if len(x) > 1 else math.nan
    return None if math.isnan(rho) else float(rho)


def _spearman(x: _Array, y: _Array) -> _Array:
    """The same for each row of ``x`` [K, N]: [K], NaN where it is not defined."""
    a, b = rankdata(x, axis=1), rankdata(y)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean()
    norm = np.sqrt((a * a).sum(axis=1) * (b @ b))
    rho = np.divide(a @ b, norm, out=np.full(len(x), np.nan), where=norm > 0)
    return np.clip(rho, -1.0, 1.0)


def _value(reward: Reward, horizon: Horizon, name: str) -> float:
    at = reward.horizons[horizon]
    return at.total if name == "total" else at.components[name]


def _bootstrap(
    x: _Array, y: _Array, groups: Sequence[str], level: float, num_resamples: int, seed: int
) -> list[tuple[float | None, float | None]]:
    """Percentile intervals for each row of ``x`` [K, N] against ``y`` [N]; the rows share their resamples."""
    nothing: list[tuple[float | None, float | None]] = [(None, None)] * len(x)
    labels = sorted(set(groups))
    members = [np.flatnonzero(np.array(groups) == label) for label in labels]
    if len(members) == 1:
        members = [np.array([i]) for i in range(len(y))]
    if len(members) < _FEWEST:
        return nothing
    generator = np.random.default_rng(seed)
    rhos = np.empty((num_resamples, len(x)))
    for row in rhos:
        drawn = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        row[:] = _spearman(x[:, drawn], y[drawn])
    return [_interval(column[~np.isnan(column)], level) for column in rhos.T]


def _interval(rhos: _Array, level: float) -> tuple[float | None, float | None]:
    if not len(rhos):
        return None, None
    low, high = np.quantile(rhos, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
