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

__all__ = ["ComponentCorrelation", "correlations", "spearman"]

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class ComponentCorrelation:
    """How one component up to one horizon goes with the final utility.

    Attributes:
        component: Of :data:`~esper.tamiyo.rewards.config.COMPONENTS`, or ``total``.
        horizon: Of the component.
        rho: Spearman's rank correlation; None where the component or the outcome never differs.
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
    found = []
    for horizon in HORIZONS:
        kept = [i for i, (_, r) in enumerate(rows) if horizon in r.horizons]
        groups = [runs[i] for i in kept]
        for name in (*COMPONENTS, "total"):
            values = np.array([_value(rows[i][1], horizon, name) for i in kept])
            rho = spearman(values, final[kept])
            low, high = _bootstrap(values, final[kept], groups, level, num_resamples, seed)
            found.append(
                ComponentCorrelation(
                    name, horizon, rho, low if rho is not None else None, high if rho is not None else None,
                    len(kept), len(set(groups)),
                )
            )  # fmt: skip
    return found


def spearman(x: _Array, y: _Array) -> float | None:
    """Rank correlation of ``x`` [N] and ``y`` [N], ties by their mean rank; None where it is not defined."""
    if len(x) < 2:
        return None
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return None if norm == 0 else max(-1.0, min(1.0, float(a @ b) / norm))


def _value(reward: Reward, horizon: Horizon, name: str) -> float:
    at = reward.horizons[horizon]
    return at.total if name == "total" else at.components[name]


def _bootstrap(
    x: _Array, y: _Array, groups: Sequence[str], level: float, num_resamples: int, seed: int
) -> tuple[float | None, float | None]:
    labels = sorted(set(groups))
    members = [np.flatnonzero(np.array(groups) == label) for label in labels]
    if len(members) == 1:
        members = [np.array([i]) for i in range(len(x))]
    if len(members) < 3:
        return None, None
    generator = np.random.default_rng(seed)
    rhos = []
    for _ in range(num_resamples):
        drawn = np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
        rho = spearman(x[drawn], y[drawn])
        if rho is not None:
            rhos.append(rho)
    if not rhos:
        return None, None
    low, high = np.quantile(rhos, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
