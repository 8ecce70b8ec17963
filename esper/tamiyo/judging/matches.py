"""Which runs arms are compared on: hosts that nothing was learned or tuned on, with a price and a budget each."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec

from esper.errors import ConfigError, DataNotFoundError
from esper.messages import Count, NonNegative
from esper.tamiyo.environment.config import BUDGETS, PRICES
from esper.tamiyo.environment.data import load_task
from esper.tamiyo.environment.families import FAMILIES, KNOWN, SEALED, sample_host
from esper.tamiyo.environment.shapes import choose
from esper.tamiyo.environment.specs import HostSpec, Split, derived_seed

__all__ = ["GROUPS", "Group", "Match", "available", "draw_matches"]

Group = Literal["fresh", "sealed", "validation"]
GROUPS: tuple[Group, ...] = ("fresh", "sealed", "validation")
"""``fresh`` hosts of known families and hosts of ``sealed`` families are judged on; ``validation`` hosts are
what fixed rules are chosen on."""

_SPLITS: dict[Group, Split] = {"fresh": "test", "sealed": "sealed", "validation": "validation"}


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """One run that every arm plays.

    Attributes:
        group: Where its host is from.
        spec: The run.
        repeat: Of its first weights and the order of its data.
        price: λ: utility lost per unit of log(parameters / host parameters).
        budget: Parameters over the host's, at most.
    """

    group: Group
    spec: HostSpec
    repeat: Count = 0
    price: NonNegative = 0.0
    budget: float = 2.0

    @property
    def name(self) -> str:
        """Tells matches apart."""
        return f"{self.spec.name}#{self.repeat}"


def available(families: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Families whose data are here, and why others are left out.

    Args:
        families: Only these; empty for all.

    Raises:
        ConfigError: There is no such family.
    """
    if unknown := [name for name in families if name not in FAMILIES]:
        raise ConfigError(f"no host family {', '.join(unknown)}; families are {', '.join(FAMILIES)}")
    found, notes = [], []
    for family in families or tuple(FAMILIES):
        if family in SEALED:
            try:
                load_task(sample_host(family, "sealed", 0).task)
            except DataNotFoundError as error:
                notes.append(f"{family} is skipped: {error}")
                continue
        found.append(family)
    return found, notes


def draw_matches(
    families: Sequence[str],
    *,
    hosts: int,
    repeats: int = 1,
    validation: bool = False,
    first_host: int = 0,
    max_steps: int | None = None,
) -> list[Match]:
    """Hosts of every family in turn, so that whatever has been played by some moment is balanced.

    A host's price and budget are drawn once, by its name.

    Args:
        families: Of hosts.
        hosts: Of each family.
        repeats: Of each host.
        validation: Validation hosts; sealed families have none.
        first_host: Number of the first host.
        max_steps: Longer runs are cut to so many steps, for trying things out.

    Raises:
        ConfigError: Fewer than one host or repeat.
    """
    if hosts < 1 or repeats < 1:
        raise ConfigError(f"expected at least one host and one repeat, got {hosts} and {repeats}")
    drawn = []
    for number in range(first_host, first_host + hosts):
        for repeat in range(repeats):
            for family in families:
                group: Group = "validation" if validation else "fresh" if family in KNOWN else "sealed"
                if validation and family in SEALED:
                    continue
                spec = sample_host(family, _SPLITS[group], number)
                random = Random(derived_seed("judged", spec.name))
                price, budget = choose(random, PRICES), choose(random, BUDGETS)
                if max_steps is not None:
                    spec = spec.shortened(max_steps)
                drawn.append(Match(group=group, spec=spec, repeat=repeat, price=price, budget=budget))
    return drawn
