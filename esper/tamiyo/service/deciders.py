"""Who chooses among the candidates of decision points: a rule, or a policy network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper.errors import ConfigError
from esper.tamiyo.graph.facts import DecisionPoint

__all__ = ["Choice", "Decider", "RuleDecider", "make_decider"]


@dataclass(frozen=True)
class Choice:
    """One candidate of a decision point, and what speaks for it.

    Attributes:
        candidate: Its place among the point's candidates; 0 is WAIT.
        reason: Why, in words.
        confidence: In [0, 1].
        uncertainty: Epistemic, in [0, 1].
        value: Expected utility of the run from here, in nats; 0 where none is known.
        urgency: Expected cost of waiting one decision interval, in nats.
        risk: Probability that it has to be undone.
        logprob: Natural logarithm of the probability with which it was drawn; 0 when nothing was drawn.
        abstained: The decider does not know such states, and fell back.
    """

    candidate: int
    reason: str
    confidence: float = 1.0
    uncertainty: float = 0.0
    value: float = 0.0
    urgency: float = 0.0
    risk: float = 0.0
    logprob: float = 0.0
    abstained: bool = False

    def problem(self, point: DecisionPoint) -> str:
        """Why this is no choice for ``point``; empty when it is one."""
        if not 0 <= self.candidate < len(point.candidates):
            return f"candidate {self.candidate} of {len(point.candidates)} was chosen"
        if why := point.candidates[self.candidate].unavailable:
            return f"candidate {self.candidate} was chosen, which is not available: {why}"
        numbers = (self.value, self.urgency, self.logprob)
        shares = (self.confidence, self.uncertainty, self.risk)
        if not all(map(math.isfinite, numbers)) or self.urgency < 0 or not all(0 <= x <= 1 for x in shares):
            return f"a choice came with numbers that are none: {self}"
        return ""


class Decider(Protocol):
    """Chooses; the same points get the same choices, in whatever company they come."""

    name: str
    version: str

    def choose(self, points: Sequence[DecisionPoint]) -> list[Choice]:
        """One choice for each point."""


class RuleDecider:
    """A fixed rule over candidates.

    Args:
        rule: Name of a rule of :mod:`esper.tamiyo.oracle.rules`, with its first options, or name and options
            as the rule prints itself: ``cond(size=large, ratio=0.5)``.

    Raises:
        ConfigError: There is no such rule.
    """

    def __init__(self, rule: str) -> None:
        from esper.tamiyo.oracle.rules import RULES

        every = [variant for variants in RULES.values() for variant in variants]
        found = [variant for variant in every if rule in (variant.name, str(variant))]
        if not found:
            raise ConfigError(
                f"expected a decider of tamiyo, {', '.join(RULES)}, one with options such as {every[-1]}, or a file "
                f"of weights (.safetensors), got {rule!r}"
            )
        self._rule = found[0]
        self.name = str(self._rule) if self._rule.options else self._rule.name
        self.version = ""

    def choose(self, points: Sequence[DecisionPoint]) -> list[Choice]:
        """One choice for each point."""
        return [
            Choice(index, "what the rule says" if index else "the rule says nothing")
            for index in map(self._rule.choose, points)
        ]


def make_decider(name: str) -> Decider:
    """Make the decider that a config names.

    Args:
        name: See :class:`~esper.tamiyo.service.config.ServiceConfig`.

    Raises:
        ConfigError: There is no such rule, or no such file, or it holds no policy network.
    """
    if name != "tamiyo" and not name.endswith(".safetensors"):
        return RuleDecider(name)
    from esper.tamiyo.service.network_decider import NetworkDecider

    return NetworkDecider(None if name == "tamiyo" else Path(name))
