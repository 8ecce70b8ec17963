"""How good choices are on the table's states, against the oracle and against fixed rules."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from esper.report.statistics import Estimate
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.oracle.analysis import best_rule, judge, over_hosts, tune
from esper.tamiyo.oracle.rules import Rule
from esper.tamiyo.pipeline.dataset import Case, wait_is_best

__all__ = ["Score", "best_rules", "difference", "rule_choices", "score", "utility"]


@dataclass(frozen=True)
class Score:
    """Choices on states of one split; means are over hosts, prices alike.

    Attributes:
        utility: Against WAIT, in nats.
        median: The same over states.
        regret: To the oracle that picks on one half of the repeats and is scored on the other.
        accuracy: Share within 10 % of the best utility, or within one standard error of a difference
            (:func:`esper.tamiyo.oracle.analysis.judge`).
        strict: The same without that allowance.
        wait: Share of states in which WAIT was chosen.
        wait_where_best: The same where no candidate is worth more than noise.
        wait_elsewhere: The same in all others.
        num_states: Judged on, every price counted.
    """

    utility: Estimate
    median: float
    regret: Estimate
    accuracy: Estimate
    strict: Estimate
    wait: float
    wait_where_best: float | None
    wait_elsewhere: float | None
    num_states: int


def score(cases: Sequence[Case], chosen: Sequence[int]) -> Score:
    """Judge choices by all that was tried.

    Raises:
        DataFormatError: What was chosen is not available.
    """
    per_state = [
        judge([case.record], _constant(index), case.price) for case, index in zip(cases, chosen, strict=True)
    ]
    records = [case.record for case in cases]
    best = [wait_is_best(case) for case in cases]
    waits = [index == 0 for index in chosen]

    def over(read: Callable[[int], float]) -> Estimate:
        return over_hosts(records, [read(i) for i in range(len(cases))])

    def share(where: bool) -> float | None:
        own = [w for w, b in zip(waits, best, strict=True) if b == where]
        return statistics.fmean(own) if own else None

    return Score(
        utility=over(lambda i: per_state[i].utility.mean),
        median=statistics.median(j.utility.mean for j in per_state),
        regret=over(lambda i: per_state[i].regret.mean),
        accuracy=over(lambda i: per_state[i].accuracy.mean),
        strict=over(lambda i: per_state[i].strict.mean),
        wait=statistics.fmean(waits),
        wait_where_best=share(True),
        wait_elsewhere=share(False),
        num_states=len(cases),
    )


def utility(cases: Sequence[Case], chosen: Sequence[int]) -> float:
    """Mean utility over hosts, in nats."""
    return difference(cases, chosen, [0] * len(cases)).mean


def difference(cases: Sequence[Case], chosen: Sequence[int], other: Sequence[int]) -> Estimate:
    """Utility of some choices less that of others on the same states: mean over hosts, with an interval."""
    gaps = [float(c.means[a] - c.means[b]) for c, a, b in zip(cases, chosen, other, strict=True)]
    return over_hosts([case.record for case in cases], gaps)


def best_rules(validation: Sequence[Case]) -> dict[float, Rule]:
    """Price -> the fixed rule, with its options, that is best on the validation states."""
    found = {}
    for price in sorted({case.price for case in validation}):
        records = [case.record for case in validation if case.price == price]
        found[price] = best_rule(records, price, tune(records, price))
    return found


def rule_choices(rules: Mapping[float, Rule], cases: Sequence[Case]) -> list[int]:
    """What the rule of each case's price chooses."""
    found = []
    for case in cases:
        assert case.state.point is not None
        found.append(rules[case.price].choose(case.state.point))
    return found


def _constant(index: int) -> Callable[[DecisionPoint], int]:
    return lambda point: index
