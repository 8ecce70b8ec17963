"""Transitions, fresh and replayed, as the tensors that one optimizer step needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.learning.gae import gae
from esper.tamiyo.learning.packed import batch
from esper.tamiyo.learning.replay import Experience
from esper.tamiyo.learning.trajectory import Trajectory

__all__ = ["Fresh", "Minibatch", "collate", "fresh_experiences"]


@dataclass(frozen=True)
class Fresh:
    """A transition of this update, with the advantage of its trajectory."""

    experience: Experience
    advantage: float


@dataclass(frozen=True)
class Minibatch:
    """What a step sees of B transitions.

    Attributes:
        graphs: States.
        actions: Chosen candidates, each within its graph [B].
        logprobs: Under the behaviour policy [B].
        advantages: Generalised advantages; NaN where they are to be ``targets − V`` of the target network [B].
        targets: What the value should be [B].
        urgency: Measured, or NaN [B].
        risk: Measured, or NaN; NaN for WAIT too [B].
        weights: Importance weights; 1 for fresh transitions [B].
        ages: Optimizer steps since each came [B].
    """

    graphs: CandidateGraph
    actions: Tensor
    logprobs: Tensor
    advantages: Tensor
    targets: Tensor
    urgency: Tensor
    risk: Tensor
    weights: Tensor
    ages: Tensor


def fresh_experiences(
    trajectories: Sequence[Trajectory],
    *,
    critic: nn.Module,
    gamma: float,
    gae_lambda: float,
    born: int,
    device: torch.device,
) -> list[Fresh]:
    """Advantages and λ-returns of whole trajectories, in order.

    Args:
        trajectories: Those whose policy ran without a critic have no values.
        critic: Gives those their values; it reads all of their states at once.
        gamma: Discount a decision.
        gae_lambda: λ.
        born: Optimizer steps so far.
        device: Where the critic is.
    """
    found = []
    for trajectory in trajectories:
        values = trajectory.values
        unknown = np.flatnonzero(np.isnan(values)).tolist()
        if unknown:
            with torch.no_grad():
                graphs = batch([trajectory.steps[i].graph for i in unknown]).to(device)
                values[unknown] = critic(graphs).value.double().cpu().numpy()
        advantages, returns = gae(
            trajectory.rewards, values, trajectory.final_value, gamma=gamma, gae_lambda=gae_lambda
        )
        found += [
            Fresh(Experience(step, target=float(target), born=born), float(advantage))
            for step, target, advantage in zip(trajectory.steps, returns, advantages, strict=True)
        ]
    return found


def collate(
    fresh: Sequence[Fresh],
    replayed: Sequence[Experience],
    weights: NDArray[np.float64],
    *,
    target_network: nn.Module,
    gamma: float,
    step: int,
    device: torch.device,
) -> Minibatch:
    """Join fresh transitions and replayed ones, in this order.

    Args:
        fresh: Of this update.
        replayed: Drawn from the buffer.
        weights: Of the drawn ones.
        target_network: Says what a state is worth that follows a transition which came without its trajectory.
        gamma: Discount a decision.
        step: Optimizer steps so far.
        device: Where the network is.
    """
    experiences = [*(f.experience for f in fresh), *replayed]
    steps = [e.transition for e in experiences]

    def tensor(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Minibatch(
        graphs=batch([s.graph for s in steps]).to(device),
        actions=torch.tensor([s.action for s in steps], device=device),
        logprobs=tensor([s.logprob for s in steps]),
        advantages=tensor([*(f.advantage for f in fresh), *[math.nan] * len(replayed)]),
        targets=_targets(experiences, target_network, gamma, device),
        urgency=tensor([s.urgency for s in steps]),
        risk=tensor([s.risk if s.action else math.nan for s in steps]),
        weights=tensor([*[1.0] * len(fresh), *weights.tolist()]),
        ages=tensor([step - e.born for e in experiences]),
    )


@torch.no_grad()
def _targets(
    experiences: Sequence[Experience], target_network: nn.Module, gamma: float, device: torch.device
) -> Tensor:
    """λ-returns where a trajectory gave one, else ``r + γ V(s')`` of the target network [B]."""
    targets = torch.tensor(
        [e.transition.reward if math.isnan(e.target) else e.target for e in experiences],
        dtype=torch.float32,
        device=device,
    )
    open_ = [i for i, e in enumerate(experiences) if math.isnan(e.target) and e.next_graph is not None]
    if open_:
        following = [graph for i in open_ if (graph := experiences[i].next_graph) is not None]
        targets[open_] += gamma * target_network(batch(following).to(device)).value
    return targets
