"""How good choices are, by what every choice was worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from esper.errors import DataFormatError
from esper.tamiyo.learning.rows import ValueRow

__all__ = ["WITHIN", "decision_metrics", "is_accurate"]

WITHIN = 0.1
"""Share of the best utility that an accurate choice may lose."""

_NUM_BINS = 10

Floats = NDArray[np.float64]


def is_accurate(row: ValueRow, choice: int, *, noise: float = 0.0) -> bool:
    """Whether a choice is within 10 % of the best: ``U_choice ≥ U* − max(0.1·U*, noise)``.

    U* is the best utility among the candidates that were tried, WAIT's 0 included, so it is never negative.
    Where WAIT is best, 10 % of U* is nothing: without an allowance for noise only a candidate worth
    exactly 0 is right.

    Args:
        row: The decision.
        choice: A candidate that was tried.
        noise: In nats; ``row.noise`` allows one standard error of a difference.
    """
    best = _best(row)
    return bool(row.utility[choice] >= best - max(WITHIN * best, noise))


def decision_metrics(predicted: Sequence[Floats], rows: Sequence[ValueRow]) -> dict[str, float]:
    """Judge predicted utilities, each decision taking the tried candidate that is predicted best.

    Means over decisions are means over hosts of each host's mean. A name is left out when there is too little to
    make it of.

    Args:
        predicted: Of each decision, utilities against WAIT, in nats [C].
        rows: What they were.

    Returns:
        ``accuracy`` (:func:`is_accurate` with the row's noise), ``accuracy/strict`` (without), ``regret`` (U* − U of
        the choice), ``regret/median``, ``utility``, ``utility/median``, ``utility/best``, ``wait_share``,
        ``rank_correlation`` (Spearman's ρ over the tried candidates of a decision, mean over those with three or
        more that differ), ``calibration/slope`` (of the least-squares line of measured on predicted utility over
        candidates other than WAIT; 1 is right, below 1 too bold), ``calibration/error`` (mean difference of
        predicted and measured means over ten bins of equal count, nats), ``num_decisions``.

    Raises:
        DataFormatError: No rows, or predictions that do not fit them or are NaN where they count.
    """
    _check(predicted, rows)
    choices = [
        int(np.argmax(np.where(row.tried, p, -np.inf))) for p, row in zip(predicted, rows, strict=True)
    ]
    taken = np.array([row.utility[choice] for row, choice in zip(rows, choices, strict=True)])
    best = np.array([_best(row) for row in rows])
    pairs = list(zip(rows, choices, strict=True))

    def mean(values: Sequence[float] | Floats) -> float:
        return _over_groups([row.group for row in rows], values)

    found = {
        "accuracy": mean([is_accurate(row, choice, noise=row.noise) for row, choice in pairs]),
        "accuracy/strict": mean([is_accurate(row, choice) for row, choice in pairs]),
        "regret": mean(best - taken),
        "regret/median": float(np.median(best - taken)),
        "utility": mean(taken),
        "utility/median": float(np.median(taken)),
        "utility/best": mean(best),
        "wait_share": mean([choice == 0 for choice in choices]),
        "num_decisions": float(len(rows)),
    }
    correlations = [
        r for p, row in zip(predicted, rows, strict=True) if (r := _rank_correlation(p, row)) is not None
    ]
    if correlations:
        found["rank_correlation"] = float(np.mean(correlations))
    found.update(_calibration(predicted, rows))
    return found


def _check(predicted: Sequence[Floats], rows: Sequence[ValueRow]) -> None:
    if not rows or len(predicted) != len(rows):
        raise DataFormatError(
            f"expected predictions of at least one decision, got {len(predicted)} of {len(rows)}"
        )
    for i, (p, row) in enumerate(zip(predicted, rows, strict=True)):
        if p.shape != row.utility.shape or np.isnan(p[row.tried]).any():
            raise DataFormatError(
                f"expected predictions of {row.utility.size} candidates without NaN for decision {i} ({row.group}), "
                f"got {p}"
            )


def _best(row: ValueRow) -> float:
    return float(row.utility[row.tried].max())


def _over_groups(groups: Sequence[str], values: Sequence[float] | Floats) -> float:
    _, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    return float((sums / np.bincount(index)).mean())


def _rank_correlation(predicted: Floats, row: ValueRow) -> float | None:
    tried = row.tried
    ranks = [rankdata(values[tried]) for values in (predicted, row.utility)]
    if tried.sum() < 3 or np.ptp(ranks[1]) == 0:
        return None
    # a model that tells no candidate from another has not ranked them at all
    return float(np.corrcoef(*ranks)[0, 1]) if np.ptp(ranks[0]) else 0.0


def _calibration(predicted: Sequence[Floats], rows: Sequence[ValueRow]) -> dict[str, float]:
    guesses = np.concatenate([p[1:][row.tried[1:]] for p, row in zip(predicted, rows, strict=True)])
    truths = np.concatenate([row.utility[1:][row.tried[1:]] for row in rows])
    if guesses.size < 2 * _NUM_BINS or np.ptp(guesses) == 0:
        return {}
    slope = np.cov(guesses, truths)[0, 1] / guesses.var(ddof=1)
    bins = np.array_split(np.argsort(guesses, kind="stable"), _NUM_BINS)
    gaps = [abs(guesses[b].mean() - truths[b].mean()) for b in bins]
    return {"calibration/slope": float(slope), "calibration/error": float(np.mean(gaps))}
