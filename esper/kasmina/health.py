"""One number in [0, 1] for how well a layer works: :func:`health_score`, or of all at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError

__all__ = ["RANK_ENOUGH", "SCORE_FLOOR", "UPDATE_BAND", "WEIGHTS", "health_score", "health_scores"]

Column = NDArray[np.float64]

WEIGHTS = {"alive": 0.30, "active": 0.25, "rank": 0.20, "gradient": 0.15, "update": 0.10}
"""Exponents of the five sub-scores; they sum to 1."""
RANK_ENOUGH = 0.25
"""Share of the possible effective rank from which on a layer counts as fully expressive."""
UPDATE_BAND = (1e-5, 1e-1)
"""Relative weight change a step within which learning is neither stuck nor unstable."""
SCORE_FLOOR = 0.05
"""Least value of every sub-score but "alive": a weak sign lowers the health, it does not annul it."""


def health_score(
    *,
    dead_neuron_ratio: float = 0.0,
    dormancy: float = 0.0,
    rank_fraction: float | None = None,
    gradient_snr: float | None = None,
    update_ratio: float | None = None,
    error_count: int = 0,
) -> float:
    r"""Combine a layer's statistics into a health in [0, 1].

    A weighted geometric mean, so that one failing property is not hidden by four good ones:

    .. math:: H = [\text{no errors}] \cdot \prod_i s_i^{w_i}

    ========  ======  ============================================================================
    property  weight  sub-score
    ========  ======  ============================================================================
    alive     .30     1 - dead_neuron_ratio: 0, and so H = 0, when every unit is dead
    active    .25     max(.05, 1 - dormancy)
    rank      .20     clip(rank_fraction / .25, .05, 1): an effective rank of a quarter is enough
    gradient  .15     clip(gradient_snr, .05, 1): pure noise gives a ratio near 1, no gradient 0
    update    .10     1 in [1e-5, 1e-1], less a third for every decade outside, at least .05
    ========  ======  ============================================================================

    H never rises with errors, dead units or dormancy, never falls with rank or gradient, and in the update
    ratio rises up to the band and falls after it. The thresholds are conventions, not measurements.

    Args:
        dead_neuron_ratio: in [0, 1].
        dormancy: in [0, 1].
        rank_fraction: effective rank over its largest possible value, in [0, 1].
        gradient_snr: norm of the mean output gradient over its standard error, >= 0.
        update_ratio: weight change of a step over the weight's norm, >= 0.
        error_count: non-finite values seen; any at all gives 0.

    ``None`` (not measured: a frozen layer, a step without gradients) leaves a property out: sub-score 1.

    Raises:
        ConfigError: a value is NaN or outside its range.
    """
    _check("dead_neuron_ratio", dead_neuron_ratio, 1.0)
    _check("dormancy", dormancy, 1.0)
    _check("error_count", error_count, math.inf)
    if rank_fraction is not None:
        _check("rank_fraction", rank_fraction, 1.0)
    if gradient_snr is not None:
        _check("gradient_snr", gradient_snr, math.inf)
    if update_ratio is not None:
        _check("update_ratio", update_ratio, math.inf)
    columns = [
        np.array([math.nan if value is None else value], dtype=np.float64)
        for value in (dead_neuron_ratio, dormancy, rank_fraction, gradient_snr, update_ratio, error_count)
    ]
    return float(health_scores(*columns)[0])


def health_scores(
    dead_neuron_ratio: Column,
    dormancy: Column,
    rank_fraction: Column,
    gradient_snr: Column,
    update_ratio: Column,
    error_count: Column,
) -> Column:
    """:func:`health_score` of many layers at once; each argument ``[L]`` float64, NaN where not measured.

    Returns:
        ``[L]`` in [0, 1]. Ranges are not looked at: ``esper.kasmina.statistics`` keeps to them.
    """
    low, high = np.log10(UPDATE_BAND)
    decade = np.log10(np.maximum(update_ratio, 1e-300))
    outside = np.maximum(0.0, np.maximum(low - decade, decade - high))
    score = (1.0 - dead_neuron_ratio) ** WEIGHTS["alive"]
    score *= np.maximum(SCORE_FLOOR, 1.0 - dormancy) ** WEIGHTS["active"]
    for name, sub_score in (
        ("rank", rank_fraction / RANK_ENOUGH),
        ("gradient", gradient_snr),
        ("update", 1.0 - outside / 3.0),
    ):
        # fmin and fmax pass NaN over: what was not measured counts as 1
        score *= np.fmax(SCORE_FLOOR, np.fmin(1.0, sub_score)) ** WEIGHTS[name]
    return np.where(error_count > 0, 0.0, np.minimum(1.0, score))


def _check(name: str, value: float, largest: float) -> None:
    if not 0.0 <= value <= largest:  # also false for NaN
        raise ConfigError(
            f"expected {name} in [0, {largest:g}] for a health score, got {value}; pass statistics from "
            "esper.kasmina.statistics, which are clamped to their ranges"
        )
