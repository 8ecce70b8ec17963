"""Who answers decision points in rollouts: made anew in each worker from plain, picklable parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from esper.tamiyo.graph.data import ModelGraphState
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork

__all__ = ["Choice", "Chooser", "MakeChooser", "NetworkChooser", "RandomChooser", "WaitChooser"]


class Choice(NamedTuple):
    """A candidate, its log-probability under whoever chose it, and V(s) where there is a critic."""

    candidate: int
    logprob: float
    value: float = math.nan


class Chooser(Protocol):
    """Chooses one candidate of a decision point."""

    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        """Choose; all chance comes from ``generator``."""


MakeChooser = Callable[[], Chooser]
"""Called once for each batch of rollouts in each worker; must pickle, as the dataclasses below do."""


class _Waiting:
    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        return Choice(0, 0.0)


class _Random:
    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        available = state.mask.nonzero()[:, 0]
        drawn = int(torch.randint(len(available), (), generator=generator))
        return Choice(int(available[drawn]), -math.log(len(available)))


class _Network:
    def __init__(self, network: TamiyoNetwork, greedy: bool) -> None:
        self._network, self._greedy = network.eval(), greedy

    @torch.no_grad()
    def choose(self, state: ModelGraphState, generator: torch.Generator) -> Choice:
        graph = state.graph_data
        output = self._network(graph)
        distribution = self._network.distribution(output, graph)
        chosen = distribution.mode if self._greedy else distribution.sample(generator)
        logprob = 0.0 if self._greedy else float(distribution.log_prob(chosen))
        return Choice(int(chosen), logprob, float(output.value))


@dataclass(frozen=True)
class WaitChooser:
    """Makes one that always waits."""

    def __call__(self) -> Chooser:
        """Make it."""
        return _Waiting()


@dataclass(frozen=True)
class RandomChooser:
    """Makes one that draws from the available candidates uniformly."""

    def __call__(self) -> Chooser:
        """Make it."""
        return _Random()


@dataclass(frozen=True)
class NetworkChooser:
    """Makes one that follows a policy network, without dropout and without its thresholds.

    Attributes:
        config: Of the network.
        weights: Its state dict.
        greedy: Take the likeliest candidate instead of drawing one.
    """

    config: PolicyConfig
    weights: Mapping[str, Tensor]
    greedy: bool = False

    @classmethod
    def of(cls, network: TamiyoNetwork, *, greedy: bool = False) -> NetworkChooser:
        """A maker that holds a copy of the weights of ``network``."""
        weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        return cls(network.config, weights, greedy)

    def __call__(self) -> Chooser:
        """Make it."""
        network = TamiyoNetwork(self.config)
        network.load_state_dict(dict(self.weights))
        return _Network(network, self.greedy)
