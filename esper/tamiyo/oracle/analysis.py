"""What the table says: how good the best choice is, how sure that is, and what a rule or a policy loses to it.

Legend: C candidates, R repeats, U [C, R] the utility against WAIT of :func:`~esper.tamiyo.oracle.records.utilities`.
Means over states are means over hosts of the means over a host's states, and intervals resample hosts, because
states of one host are alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.report.statistics import Estimate, bootstrap_mean
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.oracle.records import StateRecord, utilities
from esper.tamiyo.oracle.rules import RULES, Rule

__all__ = [
    "PRICES",
    "Judgement",
    "best_rule",
    "difference_stderr",
    "half_splits",
    "judge",
    "judge_in_sample",
    "judge_oracle",
    "over_hosts",
    "reliability",
    "tune",
    "wait_share",
]

PRICES = (0.0, 0.03, 0.1, 0.3)
"""λ: utility lost per unit of log parameters."""

WITHIN = 0.1
"""A choice is accurate when it loses no more than this share of the best utility (and no more than noise)."""

_RESAMPLES = 2_000
"""A survey takes thousands of intervals."""

Choose = Callable[[DecisionPoint], int]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """A chooser on some states at one price.

    Attributes:
        utility: Mean over hosts.
        median: Over states.
        regret: Oracle (:func:`judge_oracle`) minus chooser, mean over hosts; below zero for a chooser that is surer
            of the best candidate than half of the repeats are.
        accuracy: Share of states in which the choice is within 10 % of the best mean utility, or within one
            standard error of a difference between two candidates of that state.
        strict: The same without the allowance for noise; where WAIT is best only choices level with it count.
        wait: Share of states in which it chose WAIT.
        num_states: Judged on.
    """

    utility: Estimate
    median: float
    regret: Estimate
    accuracy: Estimate
    strict: Estimate
    wait: float
    num_states: int


def judge(records: Sequence[StateRecord], choose: Choose, price: float) -> Judgement:
    """Judge a chooser that has not seen the outcomes.

    Args:
        records: States; their points are given to ``choose`` with ``run.price`` set.
        choose: Decision point -> index of an available candidate.
        price: λ.

    Raises:
        DataFormatError: It chose what is not available, or there are no states.
    """
    chosen = [_ask(choose, record, price) for record in records]
    return _judged(records, [[index] for index in chosen], [utilities(r, price) for r in records])


def judge_oracle(records: Sequence[StateRecord], price: float) -> Judgement:
    """Judge the candidate that is best in one half of the repeats by the other half, over all ways to halve them.

    Its accuracy is what a chooser that knows the truth as well as half the repeats do can reach. It has no
    regret by definition.

    Raises:
        DataFormatError: A state has fewer than two repeats, or there are no states.
    """
    picks, scored = [], []
    for record in records:
        table = utilities(record, price)
        halves = half_splits(record.num_repeats)
        picks.append([_best(table[:, list(pick)]) for pick, _ in halves])
        scored.append(table)
    return _judged(records, picks, scored)


def judge_in_sample(records: Sequence[StateRecord], price: float) -> Judgement:
    """Judge the candidate that is best in all repeats by the same repeats: what no chooser can pass.

    It takes the luck of the repeats for worth, and :func:`judge_oracle` picks by half of them only; what the best
    choice is really worth lies between the two.
    """
    tables = [utilities(record, price) for record in records]
    return _judged(records, [[_best(table)] for table in tables], tables)


def _judged(
    records: Sequence[StateRecord], picks: Sequence[Sequence[int]], tables: Sequence[Values]
) -> Judgement:
    utility, regret, near, strict, waits = [], [], [], [], []
    for record, picked, table in zip(records, picks, tables, strict=True):
        halves = half_splits(record.num_repeats)
        oracle = statistics.fmean(
            _mean(table[:, list(score)])[_best(table[:, list(pick)])] for pick, score in halves
        )
        if len(picked) == 1:
            own = float(_mean(table)[picked[0]])
            hits = [_hit(table, picked[0], noise) for noise in (difference_stderr(table), 0.0)]
        else:  # an oracle: each choice is scored where it was not made
            scores = [table[:, list(score)] for _, score in halves]
            noise = difference_stderr(table) * (record.num_repeats / scores[0].shape[1]) ** 0.5
            own = oracle
            hits = [
                statistics.fmean(
                    _hit(half, index, allowed) for half, index in zip(scores, picked, strict=True)
                )
                for allowed in (noise, 0.0)
            ]
        utility.append(own)
        regret.append(oracle - own)
        near.append(hits[0])
        strict.append(hits[1])
        waits.append(statistics.fmean(index == 0 for index in picked))
    return Judgement(
        utility=over_hosts(records, utility),  # refuses an empty list
        median=statistics.median(utility),
        regret=over_hosts(records, regret),
        accuracy=over_hosts(records, near),
        strict=over_hosts(records, strict),
        wait=statistics.fmean(waits),
        num_states=len(records),
    )


def reliability(records: Sequence[StateRecord], price: float, *, within: bool = False) -> float:
    """Return how well two halves of the repeats agree on the candidates' utilities, stepped up to all repeats.

    The correlation r of the two halves' mean utilities over all states and candidates but WAIT, averaged over
    all ways to halve, and 2r / (1 + r) of it.

    Source:
        Spearman (1910) and Brown (1910), British Journal of Psychology 3, for a test of twice the length.

    Args:
        records: States with two repeats or more.
        price: λ.
        within: Of the differences between the candidates of a state only; what its host gains on average
            from any growth, which is easier to tell, is taken out.

    Returns:
        At most 1; NaN where either half does not vary.
    """
    correlations = []
    repeats = {record.num_repeats for record in records}
    for index in range(max(len(half_splits(r)) for r in repeats)):
        first, second = [], []
        for record in records:
            pick, score = half_splits(record.num_repeats)[index % len(half_splits(record.num_repeats))]
            table = utilities(record, price)[1:]
            table = table[~np.isnan(table[:, 0])]
            if len(table):
                pair = [table[:, list(half)].mean(axis=1) for half in (pick, score)]
                first.append(pair[0] - pair[0].mean() if within else pair[0])
                second.append(pair[1] - pair[1].mean() if within else pair[1])
        a, b = np.concatenate(first), np.concatenate(second)
        if a.std() == 0.0 or b.std() == 0.0:
            return float("nan")
        correlations.append(float(np.corrcoef(a, b)[0, 1]))
    r = statistics.fmean(correlations)
    return 2.0 * r / (1.0 + r)


def wait_share(records: Sequence[StateRecord], price: float) -> float:
    """Share of states in which the best other candidate of one half of the repeats does not pay in the other half.

    The largest of many noisy utilities is above zero even where nothing helps, so WAIT is counted as best by
    whether acting on a first look would have paid on a second.
    """
    shares = []
    for record in records:
        table = utilities(record, price)
        outcomes = []
        for pick, score in half_splits(record.num_repeats):
            means = _mean(table[:, list(pick)])
            means[0] = -np.inf
            best = int(means.argmax())
            outcomes.append(bool(means[best] == -np.inf or _mean(table[:, list(score)])[best] <= 0.0))
        shares.append(statistics.fmean(outcomes))
    return statistics.fmean(shares)


def tune(
    records: Sequence[StateRecord], price: float, rules: Mapping[str, Sequence[Rule]] = RULES
) -> dict[str, Rule]:
    """Return the variant of each rule with the highest mean utility over hosts; the first of equals."""
    return {name: max(variants, key=partial(_worth, records, price)) for name, variants in rules.items()}


def best_rule(records: Sequence[StateRecord], price: float, tuned: Mapping[str, Rule]) -> Rule:
    """Return the tuned rule with the highest mean utility over hosts; the first of equals."""
    return max(tuned.values(), key=partial(_worth, records, price))


def _worth(records: Sequence[StateRecord], price: float, rule: Rule) -> float:
    values = [float(_mean(utilities(r, price))[_ask(rule.choose, r, price)]) for r in records]
    return statistics.fmean(_by_host(records, values))


def half_splits(repeats: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to put half of the repeats (rounded down) on one side and the rest on the other.

    Raises:
        DataFormatError: Fewer than two repeats.
    """
    if repeats < 2:
        raise DataFormatError(f"expected at least two repeats of a state to compare halves, got {repeats}")
    every = range(repeats)
    return [
        (half, tuple(index for index in every if index not in half))
        for half in combinations(every, repeats // 2)
    ]


def over_hosts(records: Sequence[StateRecord], values: Sequence[float]) -> Estimate:
    """Mean over hosts of a value of each state, with an interval over hosts."""
    return bootstrap_mean(_by_host(records, values), resamples=_RESAMPLES)


def _by_host(records: Sequence[StateRecord], values: Sequence[float]) -> list[float]:
    by_host: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        by_host.setdefault(record.host_key, []).append(value)
    if not by_host:
        raise DataFormatError("expected at least one state to judge on, got none")
    return [statistics.fmean(own) for own in by_host.values()]


def _ask(choose: Choose, record: StateRecord, price: float) -> int:
    run = msgspec.structs.replace(record.point.run, price=price)
    index = choose(msgspec.structs.replace(record.point, run=run))
    candidates = record.point.candidates
    if not 0 <= index < len(candidates) or candidates[index].unavailable:
        raise DataFormatError(
            f"state {record.state_id!r}: expected the index of one of {len(candidates)} candidates that is available, "
            f"got {index}"
        )
    return index


def _mean(table: Values) -> Values:
    """Mean over repeats [C]; -inf for what was not tried."""
    means = table.mean(axis=1)
    return np.where(np.isnan(means), -np.inf, means)


def _best(table: Values) -> int:
    return int(_mean(table).argmax())


def _hit(table: Values, index: int, noise: float) -> float:
    means = _mean(table)
    best = float(means.max())
    return float(means[index] >= best - max(WITHIN * best, noise))


def difference_stderr(table: Values) -> float:
    """Standard error of the difference between two candidates' mean utilities, sqrt(2 s² / R).

    s² is the mean square of what is left of U [C, R] without its row and column means: repeats are shared by all
    candidates, so what a repeat does to all of them alike is no noise. 0 with one repeat or one candidate.
    """
    tried = table[~np.isnan(table[:, 0])]
    rows, repeats = tried.shape
    if rows < 2 or repeats < 2:
        return 0.0
    rest = tried - tried.mean(axis=1, keepdims=True) - tried.mean(axis=0, keepdims=True) + tried.mean()
    return float(np.sqrt(2.0 * (rest**2).sum() / ((rows - 1) * (repeats - 1)) / repeats))
