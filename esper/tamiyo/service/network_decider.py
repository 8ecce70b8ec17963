"""A policy network as the service's decider: all points that wait go through it at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.network.decision import Verdict
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import load_network, shipped
from esper.tamiyo.service.deciders import Choice, RuleDecider

__all__ = ["NetworkDecider"]


class NetworkDecider:
    """Chooses by a policy network; where it abstains, a rule does.

    Args:
        weights: File that :func:`~esper.tamiyo.network.weights.save_network` wrote, or a network; None for the one
            that came with the package.
        fallback: Rule for points that the network does not know (:class:`~esper.tamiyo.service.deciders.RuleDecider`).

    Raises:
        CheckpointError: The file holds no policy network that fits.
        ConfigError: None came with the package, or there is no such rule.
    """

    name = "tamiyo"

    def __init__(self, weights: Path | TamiyoNetwork | None = None, fallback: str = "expressivity") -> None:
        if isinstance(weights, TamiyoNetwork):
            self.network, self.version = weights.eval(), "in memory"
        else:
            path = weights if weights is not None else shipped()
            self.network, self.version = load_network(path), path.stem
        self._fallback = RuleDecider(fallback)
        self._builder = ModelGraphBuilder()

    def choose(self, points: Sequence[DecisionPoint]) -> list[Choice]:
        """One choice for each point.

        Raises:
            MessageError: A candidate or a seed lies at a layer that the topology does not have.
        """
        states = [self._builder.build(point) for point in points]
        # how often a run may adapt is the gates' business
        verdicts = self.network.decide_all(states, [0] * len(states))
        return [self._choice(point, verdict) for point, verdict in zip(points, verdicts, strict=True)]

    def _choice(self, point: DecisionPoint, verdict: Verdict) -> Choice:
        said = verdict.decision
        if verdict.outcome == "abstain":
            (fallen,) = self._fallback.choose([point])
            return Choice(
                fallen.candidate,
                f"{said.reason}; {self._fallback.name} decides: {fallen.reason}",
                uncertainty=said.uncertainty,
                value=said.value,
                urgency=said.urgency,
                abstained=True,
            )
        return Choice(
            said.candidate if verdict.outcome == "adapt" else 0,
            said.reason,
            confidence=said.confidence,
            uncertainty=said.uncertainty,
            value=said.value,
            urgency=said.urgency,
            risk=said.risk,
        )
