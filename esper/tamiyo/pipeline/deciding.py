"""What the policy would do that ships: the network, its thresholds, and the rule where it abstains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.tamiyo.environment.choosers import Choice, Chooser
from esper.tamiyo.geometric import Batch
from esper.tamiyo.graph.data import ModelGraphState
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.judging import Reading, judge
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.oracle.rules import Rule
from esper.tamiyo.pipeline.dataset import FALLBACK, Case

__all__ = ["Choices", "PolicyChooser", "RuleChooser", "choices", "greedy", "readings"]

_BATCH = 64


@dataclass(frozen=True)
class Choices:
    """What was chosen in some cases.

    Attributes:
        candidates: Of each case.
        abstained: Whether the fallback chose it.
    """

    candidates: Sequence[int]
    abstained: Sequence[bool]

    @property
    def coverage(self) -> float:
        """Share of the cases in which the network itself decided."""
        return 1.0 - float(np.mean(self.abstained))


def readings(network: TamiyoNetwork, cases: Sequence[Case]) -> list[Reading]:
    """What a network says of each case, with its uncertainty."""
    found: list[Reading] = []
    for start in range(0, len(cases), _BATCH):
        graphs = [case.state.graph_data for case in cases[start : start + _BATCH]]
        found += network.read(Batch.from_data_list(graphs))
    return found


def choices(config: PolicyConfig, cases: Sequence[Case], read: Sequence[Reading]) -> Choices:
    """Put readings to a config's thresholds."""
    found, abstained = [], []
    for case, reading in zip(cases, read, strict=True):
        verdict = judge(config, case.state, reading)
        abstained.append(verdict.outcome == "abstain")
        acts = verdict.outcome == "adapt"
        found.append(case.fallback if abstained[-1] else verdict.decision.candidate if acts else 0)
    return Choices(found, abstained)


def greedy(predicted: Sequence[NDArray[np.float64]], cases: Sequence[Case]) -> list[int]:
    """The tried candidate that is predicted best, of each case: a value model without any threshold."""
    return [
        int(np.where(case.row.tried, p, -np.inf).argmax()) for p, case in zip(predicted, cases, strict=True)
    ]


@dataclass(frozen=True)
class PolicyChooser:
    """Makes one that plays as the policy that ships.

    Attributes:
        config: Of the network, with its thresholds.
        weights: Its state dict.
    """

    config: PolicyConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, network: TamiyoNetwork) -> PolicyChooser:
        """A maker that holds a copy of the weights of ``network``."""
        weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        return cls(network.config, weights)

    def __call__(self) -> Chooser:
        """Make it."""
        network = TamiyoNetwork(self.config)
        network.load_state_dict(dict(self.weights))
        return _Policy(network.eval())


@dataclass(frozen=True)
class RuleChooser:
    """Makes one that follows the fixed rule of a run's price, until it has acted once.

    Attributes:
        rules: Price -> rule.
    """

    rules: Mapping[float, Rule]

    def __call__(self) -> Chooser:
        """Make it."""
        return _Rules(self.rules)


class _Policy:
    def __init__(self, network: TamiyoNetwork) -> None:
        self._network = network

    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        if not bool(state.mask[1:].any()):
            return Choice(0, 0.0)
        verdict = self._network.decide(state)
        if verdict.outcome == "abstain":
            assert state.point is not None
            return Choice(FALLBACK(state.point), 0.0)
        return Choice(verdict.decision.candidate if verdict.outcome == "adapt" else 0, 0.0, math.nan)


class _Rules:
    def __init__(self, rules: Mapping[float, Rule]) -> None:
        self._rules = rules

    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        point = state.point
        assert point is not None
        acted = point.run.num_parameters != point.run.host_parameters or bool(point.run.seeds)
        return Choice(0 if acted else self._rules[point.run.price].choose(point), 0.0)
