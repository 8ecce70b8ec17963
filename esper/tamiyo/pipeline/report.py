"""The figures of a learning: every chooser on validation and test hosts, at every price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from esper.report.statistics import Estimate
from esper.tamiyo.learning.supervised import predict
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.oracle.rules import Rule
from esper.tamiyo.pipeline.dataset import Case, Dataset
from esper.tamiyo.pipeline.deciding import choices, greedy, readings
from esper.tamiyo.pipeline.judging import Score, best_rules, difference, rule_choices, score
from esper.tamiyo.pipeline.supervised import Supervised

__all__ = ["TARGET_ACCURACY", "CurveFigure", "Line", "Tabled", "tabled"]

TARGET_ACCURACY = 0.8
"""Policy accuracy that learning speed is measured to."""

_SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")


@dataclass(frozen=True)
class Line:
    """One chooser on one split.

    Attributes:
        split: ``validation`` or ``test``.
        price: λ; None for all prices together.
        chooser: ``policy`` is what ships: thresholds and fallback included.
        score: How it did.
        above_rule: Its utility less that of the rule that is best on validation states.
        coverage: Share of states in which a network decided; None for what does not abstain.
    """

    split: str
    price: float | None
    chooser: str
    score: Score
    above_rule: Estimate
    coverage: float | None = None

    def plain(self) -> dict[str, Any]:
        """Numbers and text, for JSON."""
        values: dict[str, Any] = {"split": self.split, "price": self.price, "chooser": self.chooser}
        estimates = {
            "utility": self.score.utility,
            "regret": self.score.regret,
            "accuracy": self.score.accuracy,
            "strict": self.score.strict,
            "above_rule": self.above_rule,
        }
        for name, estimate in estimates.items():
            low, high = estimate.interval or (math.nan, math.nan)
            values |= {name: estimate.mean, f"{name}_low": low, f"{name}_high": high}
        return values | {
            "median": self.score.median,
            "wait": self.score.wait,
            "wait_where_best": self.score.wait_where_best,
            "wait_elsewhere": self.score.wait_elsewhere,
            "coverage": self.coverage,
            "states": self.score.num_states,
            "hosts": self.score.utility.num,
        }


@dataclass(frozen=True)
class CurveFigure:
    """One point of the learning curve: a value model without thresholds.

    Attributes:
        num_states: Experiences: states of the table that it saw.
        validation: Score there.
        test: Score there.
    """

    num_states: int
    validation: Score
    test: Score


@dataclass(frozen=True)
class Tabled:
    """What was found on the table.

    Attributes:
        lines: Every chooser.
        rules: Price -> the best fixed rule of the validation states.
        curve: Ascending.
        experiences: Fewest states from which on the accuracy on test hosts stays at the target or above; None
            when it was not reached.
    """

    lines: Sequence[Line]
    rules: Mapping[float, Rule]
    curve: Sequence[CurveFigure]
    experiences: int | None

    def line(self, split: str, chooser: str, price: float | None = None) -> Line:
        """One of them.

        Raises:
            KeyError: There is none.
        """
        for found in self.lines:
            if (found.split, found.chooser, found.price) == (split, chooser, price):
                return found
        raise KeyError((split, chooser, price))


def tabled(data: Dataset, found: Supervised, network: TamiyoNetwork, temperature: float) -> Tabled:
    """Judge everything that was learned from the table, beside fixed rules.

    Args:
        data: The table.
        found: The supervised stage.
        network: What ships.
        temperature: Of the value models.
    """
    rules = best_rules(data.validation)
    lines = []
    for split in _SPLITS:
        cases: Sequence[Case] = getattr(data, split)
        by_chooser, coverage = _choices(cases, found, network, rules, temperature)
        for price in (None, *sorted({case.price for case in cases})):
            own = [i for i, case in enumerate(cases) if price is None or case.price == price]
            some = [cases[i] for i in own]
            rule = [by_chooser["rule"][i] for i in own]
            for name, chosen in by_chooser.items():
                ours = [chosen[i] for i in own]
                lines.append(
                    Line(
                        split,
                        price,
                        name,
                        score(some, ours),
                        difference(some, ours, rule),
                        coverage if name == "policy" and price is None else None,
                    )
                )
    curve = [
        CurveFigure(
            point.num_states,
            *(
                score(cases, greedy(predict(point.fit.network(), [c.row for c in cases], temperature), cases))
                for cases in (data.validation, data.test)
            ),
        )
        for point in found.curve
    ]
    return Tabled(lines, rules, curve, _experiences(curve))


def _choices(
    cases: Sequence[Case],
    found: Supervised,
    network: TamiyoNetwork,
    rules: Mapping[float, Rule],
    temperature: float,
) -> tuple[dict[str, Sequence[int]], float]:
    """What each chooser does, and the share of states in which the policy's network decides itself."""
    rows = [case.row for case in cases]
    own = choices(network.config, cases, readings(network, cases))
    by_chooser: dict[str, Sequence[int]] = {
        "wait": [0] * len(cases),
        "rule": rule_choices(rules, cases),
        "fallback": [case.fallback for case in cases],
        "boosting": greedy(found.boosting.predict(rows), cases),
        "value model": greedy(predict(found.network, rows, temperature), cases),
        "policy": own.candidates,
    }
    return by_chooser, own.coverage


def _experiences(curve: Sequence[CurveFigure]) -> int | None:
    reached = None
    for point in sorted(curve, key=lambda p: -p.num_states):
        if point.test.accuracy.mean < TARGET_ACCURACY:
            break
        reached = point.num_states
    return reached
