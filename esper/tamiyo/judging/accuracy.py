"""Policy accuracy: how often a choice is as good as the best that was tried, on states of the oracle table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esper.report.statistics import Estimate
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import load_network, shipped
from esper.tamiyo.oracle.analysis import PRICES, Judgement, best_rule, judge, over_hosts, tune
from esper.tamiyo.oracle.records import StateRecord
from esper.tamiyo.oracle.rules import expressivity
from esper.tamiyo.oracle.splits import of_split
from esper.tamiyo.oracle.table import read_table

__all__ = ["JUDGED_SPLITS", "Accuracy", "NetworkChoice", "table_accuracy"]

JUDGED_SPLITS = ("test", "sealed")

_FALLBACK = partial(expressivity, size="large", least_share=0.025)
"""Policy ``expressivity`` with its own settings, put as one question."""

Choose = Callable[[DecisionPoint], int]


@dataclass(frozen=True)
class Accuracy:
    """Of a network and of the best rule on the states of one split, every price counted.

    Attributes:
        policy: Share of choices within 10 % of the best utility, or within one standard error of a difference
            (:class:`~esper.tamiyo.oracle.analysis.Judgement`).
        rule: The same of the rule that is best on validation states, chosen for each price.
        policy_utility: Against WAIT, in nats.
        rule_utility: The same.
        fell_back: Share of choices that the gate left to the fallback.
        num_states: In the split.
    """

    policy: Estimate
    rule: Estimate
    policy_utility: Estimate
    rule_utility: Estimate
    fell_back: float
    num_states: int


class NetworkChoice:
    """Answers decision points of the table as policy ``tamiyo`` answers those of a run.

    Args:
        network: With its thresholds.

    Attributes:
        asked: Questions so far.
        fell_back: Those that the fallback answered.
    """

    def __init__(self, network: TamiyoNetwork) -> None:
        self._network = network
        self._builder = ModelGraphBuilder()
        self.asked = self.fell_back = 0

    def __call__(self, point: DecisionPoint) -> int:
        """Choose a candidate."""
        self.asked += 1
        verdict = self._network.decide(self._builder.build(point))
        if verdict.outcome == "abstain":
            self.fell_back += 1
            return _FALLBACK(point)
        return verdict.decision.candidate if verdict.outcome == "adapt" else 0


def table_accuracy(table: Path, weights: str, prices: Sequence[float] = PRICES) -> dict[str, Accuracy]:
    """Judge a network on the test and sealed states of the table, where it has any.

    Args:
        table: Folder.
        weights: File of the network, or ``shipped``.
        prices: λ at which each state is looked at.

    Raises:
        DataNotFoundError: There is no table.
        DataFormatError: It was changed, or has no validation states to choose a rule on.
        CheckpointError: The network cannot be read.
    """
    records = read_table(table)
    network = load_network(shipped() if weights == "shipped" else weights)
    validation = of_split(records, "validation")
    rules = {price: best_rule(validation, price, tune(validation, price)).choose for price in prices}
    found = {}
    for split in JUDGED_SPLITS:
        own = of_split(records, split)
        if not own:
            continue
        choice = NetworkChoice(network)
        policy = _judged(own, dict.fromkeys(prices, choice))
        rule = _judged(own, rules)
        everywhere = [record for record in own for _ in prices]
        found[split] = Accuracy(
            policy=over_hosts(everywhere, [j.accuracy.mean for j in policy]),
            rule=over_hosts(everywhere, [j.accuracy.mean for j in rule]),
            policy_utility=over_hosts(everywhere, [j.utility.mean for j in policy]),
            rule_utility=over_hosts(everywhere, [j.utility.mean for j in rule]),
            fell_back=choice.fell_back / choice.asked,
            num_states=len(own),
        )
    return found


def _judged(records: Sequence[StateRecord], choose: Mapping[float, Choose]) -> list[Judgement]:
    """Of each state at each price, states first."""
    return [judge([record], chosen, price) for record in records for price, chosen in choose.items()]
