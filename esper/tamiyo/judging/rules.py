"""Fixed rules with their few options, and which of them validation hosts have chosen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from esper.atomic import replacing
from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.environment.config import PRICES
from esper.tamiyo.judging.arms import Arm, Plain, Rule
from esper.tamiyo.judging.figures import NONE, Board
from esper.tamiyo.judging.trial import VIEWS, Trial, View

__all__ = [
    "GRID",
    "NONE",
    "RULES_FILE",
    "SHORTCUT_FREE",
    "ChosenRules",
    "ViewChoice",
    "choose_rules",
    "frozen_rules",
    "grid_arms",
    "write_rules",
]


def _uniform(**options: Any) -> Rule:
    return Rule(policy="schedule", options={"order": "uniform"}, **options)


GRID: dict[str, dict[str, Rule]] = {
    "random": {"": Rule(policy="random")},
    "narrowest": {"": Rule(policy="narrowest")},
    "cond": {
        "": Rule(policy="cond"),
        "ratio=0.2": Rule(policy="cond", options={"ratio": 0.2}),
        "ratio=0.5": Rule(policy="cond", options={"ratio": 0.5}),
    },
    "shortcut": {"": Rule(policy="shortcut")},
    "dimensions": {"": Rule(policy="dimensions")},
    "schedule": {"": Rule(policy="schedule"), "order=uniform": _uniform()},
    "expressivity": {
        "": Rule(policy="expressivity"),
        "min_share=0.1": Rule(policy="expressivity", options={"min_share": 0.1}),
        "num_events=1": Rule(policy="expressivity", options={"num_events": 1}),
    },
    "tokens": {
        "": _uniform(least_tokens=110.0, transformers=True),
        "above=200": _uniform(least_tokens=200.0, transformers=True),
        "any host": _uniform(least_tokens=110.0),
    },
    "recycle": {
        "": Rule(policy="expressivity", options={"num_events": 0}),
        "above=0.1": Rule(policy="expressivity", options={"num_events": 0, "recycle_above": 0.1}),
    },
}  # fmt: skip
"""Rule -> its variants; the first is as the package ships it. ``tokens`` widens every layer alike where a
transformer sees many tokens a parameter (GROWTH.md §8); ``recycle`` renews dormant units and never grows (§9).
The number of events is an option of one rule only: 1 to 20 made no difference (§5)."""

SHORTCUT_FREE = ("narrowest", "cond", "dimensions", "schedule", "tokens", "recycle")
"""Rules that never lay a way around the hidden layers."""


class ViewChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Which rules are best at equal FLOPs, or at equal steps.

    Attributes:
        best: Of all that act.
        best_shortcut_free: Of :data:`SHORTCUT_FREE`.
        best_by_price: λ as text -> the best at that price, ``none`` among them.
        utilities: Rule and variant -> mean utility over hosts at each λ, and at the hosts' own (``drawn``).
    """

    best: str
    best_shortcut_free: str
    best_by_price: dict[str, str]
    utilities: dict[str, dict[str, float]] = {}


class ChosenRules(msgspec.Struct, frozen=True, kw_only=True):
    """The frozen choice.

    Attributes:
        hosts: Validation hosts that it was made on.
        failed: Runs that failed among all that were looked at; they count as worst.
        variants: Rule -> its best variant, at equal FLOPs.
        views: The best rules of each view.
    """

    hosts: list[str]
    failed: int
    variants: dict[str, str]
    views: dict[View, ViewChoice]

    @property
    def arms(self) -> dict[str, Rule]:
        """Rule -> its best variant, as an arm."""
        return {rule: GRID[rule][variant] for rule, variant in self.variants.items()}


def frozen_rules() -> ChosenRules:
    """The committed choice.

    Raises:
        DataFormatError: It does not fit this version's rules; tune anew.
    """
    try:
        found = msgspec.json.decode(RULES_FILE.read_bytes(), type=ChosenRules)
    except msgspec.DecodeError as error:
        raise DataFormatError(f"{RULES_FILE}: {error}; write it anew ({_HOW})") from error
    wrong = [f"{rule}({v})" for rule, v in found.variants.items() if v not in GRID.get(rule, {})]
    if wrong or set(found.variants) != set(GRID) or set(found.views) != set(VIEWS):
        raise DataFormatError(
            f"{RULES_FILE} should choose a variant of each of {', '.join(GRID)}, at equal FLOPs and at equal "
            f"steps; it does not{' know ' if wrong else ''}{', '.join(wrong)}; write it anew ({_HOW})"
        )
    return found


RULES_FILE = Path(__file__).with_name("rules.json")
"""The committed choice."""

_HOW = "esper bench policy --set tune=true"


def grid_arms() -> dict[str, Arm]:
    """All variants and the ungrown host, by names of the form ``rule(variant)``."""
    arms: dict[str, Arm] = {NONE: Plain()}
    for rule, variants in GRID.items():
        arms |= {_name(rule, variant): arm for variant, arm in variants.items()}
    return arms


def choose_rules(trials: Sequence[Trial]) -> ChosenRules:
    """Choose by mean utility over hosts; of equals the first, which is the one that ships.

    Args:
        trials: Of the arms of :func:`grid_arms` on validation hosts; matches that not all have played are left out.

    Raises:
        ConfigError: A trial is of another group, or no host was played by all.
    """
    if any(trial.group != "validation" for trial in trials):
        raise ConfigError("rules are chosen on validation hosts alone; got trials of other groups")
    boards = {view: Board(trials, "validation", view, list(grid_arms())) for view in VIEWS}
    if not all(board.matches for board in boards.values()):
        raise ConfigError("no validation host was played by every variant of every rule; give it more time")

    def worth(view: View, name: str, price: float | None) -> float:
        return statistics.fmean(boards[view].utilities(name, price=price))

    variants = {}
    for rule, offered in GRID.items():
        worths = {variant: worth("flops", _name(rule, variant), None) for variant in offered}
        variants[rule] = max(worths, key=worths.__getitem__)
    names = {NONE: NONE, **{rule: _name(rule, variant) for rule, variant in variants.items()}}

    def best(view: View, rules: Sequence[str], price: float | None) -> str:
        worths = {rule: worth(view, names[rule], price) for rule in rules}
        return max(worths, key=worths.__getitem__)

    def choice(view: View) -> ViewChoice:
        prices: dict[str, float | None] = {"drawn": None, **{f"{price:g}": price for price in PRICES}}
        return ViewChoice(
            best=best(view, list(GRID), None),
            best_shortcut_free=best(view, SHORTCUT_FREE, None),
            best_by_price={f"{price:g}": best(view, [NONE, *GRID], price) for price in PRICES},
            utilities={
                name: {text: worth(view, name, price) for text, price in prices.items()}
                for name in grid_arms()
            },
        )

    return ChosenRules(
        hosts=sorted({match.rpartition("#")[0] for match in boards["flops"].matches}),
        failed=sum(trial.failed for trial in trials),
        variants=variants,
        views={view: choice(view) for view in VIEWS},
    )


def write_rules(chosen: ChosenRules, path: Path) -> None:
    """Write the choice as text that can be read and compared."""
    plain = json.loads(msgspec.json.encode(chosen))
    for choice in plain["views"].values():
        for values in choice["utilities"].values():
            values |= {price: round(value, 5) for price, value in values.items()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _name(rule: str, variant: str) -> str:
    return f"{rule}({variant})"
