"""What a whole table says: oracle and tuned rules, on every split and family, at every price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from esper.errors import DataFormatError
from esper.report.statistics import Estimate
from esper.tamiyo.environment.specs import SPLITS
from esper.tamiyo.oracle.analysis import (
    PRICES,
    Judgement,
    best_rule,
    judge,
    judge_in_sample,
    judge_oracle,
    reliability,
    tune,
    wait_share,
)
from esper.tamiyo.oracle.records import StateRecord, restrict, uses_shortcut
from esper.tamiyo.oracle.rules import Rule
from esper.tamiyo.oracle.splits import of_split

__all__ = ["IN_SAMPLE", "ORACLE", "UNTUNED", "Row", "Survey", "survey"]

ORACLE, IN_SAMPLE = "oracle", "oracle in sample"
UNTUNED = "train+test"
"""Hosts that the rules' options were not chosen on: what the rules are judged by in known families."""


@dataclass(frozen=True)
class Row:
    """One chooser on one group of states at one price.

    Attributes:
        split: Of the states, or :data:`UNTUNED`.
        family: Of the states; empty for all families of the split.
        price: λ.
        shortcut: Whether long ways around were offered.
        chooser: ``oracle``, ``oracle in sample`` (scored where it was picked), or a rule's name.
        options: Of the rule, as chosen on the validation split.
        best: It is the best rule of the validation split at this price.
        judgement: How it did.
    """

    split: str
    family: str
    price: float
    shortcut: bool
    chooser: str
    options: str
    best: bool
    judgement: Judgement

    def plain(self) -> dict[str, Any]:
        """The row as numbers and text, for JSON."""
        row = {key: value for key, value in asdict(self).items() if key != "judgement"}
        for name in ("utility", "regret", "accuracy", "strict"):
            estimate: Estimate = getattr(self.judgement, name)
            low, high = estimate.interval or (math.nan, math.nan)
            row |= {name: estimate.mean, f"{name}_low": low, f"{name}_high": high}
        own = self.judgement
        return row | {
            "median": own.median,
            "wait": own.wait,
            "states": own.num_states,
            "hosts": own.utility.num,
        }


@dataclass(frozen=True)
class Survey:
    """Rows, and what has no chooser.

    Attributes:
        rows: Of every split; of ``train`` and ``test`` together and of ``sealed`` by family too.
        wait_share: ``(split, family, price)`` -> share of states in which no action pays on a second look; all
            candidates offered.
        reliability: ``(price, within)`` -> of the open splits and the sealed one together.
    """

    rows: Sequence[Row]
    wait_share: Mapping[tuple[str, str, float], float]
    reliability: Mapping[tuple[float, bool], float]

    def row(self, split: str, family: str, price: float, shortcut: bool, chooser: str = "") -> Row:
        """The row of a chooser; of the rule that is best on the validation split when ``chooser`` is empty.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            here = (row.split, row.family, row.price, row.shortcut) == (split, family, price, shortcut)
            if here and (row.chooser == chooser or (row.best and not chooser)):
                return row
        raise KeyError((split, family, price, shortcut, chooser))


def survey(records: Sequence[StateRecord], prices: Sequence[float] = PRICES) -> Survey:
    """Judge the oracle and every rule. Rules are tuned, and the best one is named, on the validation split alone.

    Raises:
        DataFormatError: The table has no validation states, or a state was tried only once.
    """
    if not of_split(records, "validation"):
        raise DataFormatError("expected validation states to choose the rules' options on, got none")
    rows: list[Row] = []
    shares: dict[tuple[str, str, float], float] = {}
    for shortcut in (True, False):
        offered = (
            list(records) if shortcut else [restrict(r, lambda c: not uses_shortcut(c)) for r in records]
        )
        for price in prices:
            tuned = tune(of_split(offered, "validation"), price)
            best = best_rule(of_split(offered, "validation"), price, tuned)
            for split, family, group in _groups(offered):
                rows += _rows(group, tuned, best, split, family, price, shortcut)
                if shortcut:
                    shares[split, family, price] = wait_share(group, price)
    agreement = {
        (p, within): reliability(records, p, within=within) for p in prices for within in (False, True)
    }
    return Survey(rows, shares, agreement)


def _groups(records: Sequence[StateRecord]) -> list[tuple[str, str, list[StateRecord]]]:
    """Each split whole; and by family what the rules were not tuned on, as far as it may be looked at alike."""
    found: list[tuple[str, str, list[StateRecord]]] = [
        (split, "", of_split(records, split)) for split in SPLITS
    ]
    untuned = of_split(records, "train") + of_split(records, "test")
    found.append((UNTUNED, "", untuned))
    for split, own in ((UNTUNED, untuned), ("sealed", of_split(records, "sealed"))):
        for family in sorted({record.family for record in own}):
            found.append((split, family, [record for record in own if record.family == family]))
    return [group for group in found if group[2]]


def _rows(
    group: Sequence[StateRecord],
    tuned: Mapping[str, Rule],
    best: Rule,
    split: str,
    family: str,
    price: float,
    shortcut: bool,
) -> list[Row]:
    rows = [
        Row(split, family, price, shortcut, name, "", False, judged(group, price))
        for name, judged in ((ORACLE, judge_oracle), (IN_SAMPLE, judge_in_sample))
    ]
    for name, rule in tuned.items():
        judgement = judge(group, rule.choose, price)
        rows.append(Row(split, family, price, shortcut, name, rule.options, rule is best, judgement))
    return rows
