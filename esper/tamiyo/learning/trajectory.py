"""What a rollout hands to the trainer: decisions, what was known when they were made, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.learning.packed import PackedGraph

__all__ = ["Trajectory", "Transition"]


@dataclass(frozen=True)
class Transition:
    """One decision and its outcome.

    Attributes:
        graph: The state.
        action: Chosen candidate, a row of the graph's candidates.
        logprob: Of ``action`` under the policy that chose it, at most 0.
        reward: That followed.
        value: V(s) of the critic that ran beside that policy; NaN when none did, then the trainer's says it.
        urgency: Measured cost of waiting here instead of acting, in nats; NaN when it was not measured.
        risk: Whether the candidate did harm (was culled or rolled back): 0 or 1, NaN when that is not known.
    """

    graph: PackedGraph
    action: int
    logprob: float
    reward: float
    value: float = math.nan
    urgency: float = math.nan
    risk: float = math.nan

    def __post_init__(self) -> None:
        num = self.graph.num_candidates
        if not 0 <= self.action < num or not self.graph.mask[self.action]:
            raise DataFormatError(
                f"expected the action to be one of the available candidates "
                f"{np.flatnonzero(self.graph.mask).tolist()} of {num}, got {self.action}"
            )
        if not (math.isfinite(self.logprob) and self.logprob <= 1e-6):
            raise DataFormatError(
                f"expected the log-probability that the action was drawn with, at most 0, got {self.logprob}; "
                "store what the behaviour policy gave"
            )
        if not math.isfinite(self.reward):
            raise DataFormatError(
                f"expected a finite reward, got {self.reward}; a run that diverged needs a finite penalty"
            )
        if math.isinf(self.urgency) or not (math.isnan(self.risk) or 0 <= self.risk <= 1):
            raise DataFormatError(
                f"expected urgency finite or NaN and risk in [0, 1] or NaN, got {self.urgency} and {self.risk}"
            )

    @classmethod
    def of(
        cls, graph: CandidateGraph, action: int, logprob: float, reward: float, **more: float
    ) -> Transition:
        """Pack ``graph`` and check the rest."""
        return cls(PackedGraph.pack(graph), action, logprob, reward, **more)


@dataclass(frozen=True)
class Trajectory:
    """Decisions of one episode in order.

    Attributes:
        steps: At least one.
        terminated: The episode ended by itself, so nothing follows.
        final_value: V of the state after the last step where the episode was cut off instead (truncated).
    """

    steps: Sequence[Transition]
    terminated: bool = True
    final_value: float = 0.0

    def __post_init__(self) -> None:
        if not self.steps:
            raise DataFormatError(
                "expected a trajectory of at least one decision, got none; drop empty episodes"
            )
        if self.terminated and self.final_value:
            raise DataFormatError(
                f"expected final_value 0 of an episode that ended, got {self.final_value}; only one that was cut "
                "off (terminated=False) has a value to go on from"
            )

    @property
    def rewards(self) -> NDArray[np.float64]:
        """[T]."""
        return np.array([step.reward for step in self.steps], dtype=np.float64)

    @property
    def values(self) -> NDArray[np.float64]:
        """[T]."""
        return np.array([step.value for step in self.steps], dtype=np.float64)

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of rewards."""
        return float(self.rewards.sum())
