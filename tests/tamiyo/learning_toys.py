"""Hand-made decision points with a known best candidate, and a network small enough to learn them in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from esper.tamiyo.geometric import scatter
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.learning.packed import PackedGraph, batch
from esper.tamiyo.learning.trajectory import Trajectory, Transition
from esper.tamiyo.network.distribution import CandidateDistribution
from esper.tamiyo.network.network import PolicyOutput

NODE, GLOBAL, CANDIDATE = 3, 2, 2


def graph(
    nodes: Sequence[float], *, context: float = 0.0, unavailable: Sequence[int] = (), wait_bonus: float = 0.0
) -> CandidateGraph:
    """A chain of layers with one number each; WAIT, and a candidate for every layer."""
    n = len(nodes)
    x = torch.zeros(n, NODE)
    x[:, 0] = torch.tensor(nodes, dtype=torch.float32)
    candidate_attr = torch.zeros(n + 1, CANDIDATE)
    candidate_attr[0, 0] = 1.0
    candidate_attr[:, 1] = wait_bonus
    mask = torch.ones(n + 1, dtype=torch.bool)
    mask[list(unavailable)] = False
    return CandidateGraph(
        x=x,
        edge_index=torch.stack([torch.arange(n - 1), torch.arange(1, n)]),
        edge_attr=torch.ones(n - 1, 1),
        global_features=torch.tensor([[context, 1.0]]),
        candidate_attr=candidate_attr,
        candidate_mask=mask,
        candidate_batch=torch.zeros(n + 1, dtype=torch.long),
        placement_index=torch.arange(n).repeat(2, 1),
        placement_candidate=torch.arange(1, n + 1),
    )


class ToyNetwork(nn.Module):
    """What :class:`TamiyoNetwork` promises, of two small perceptrons."""

    def __init__(self, hidden: int = 32, dropout: float = 0.0, wait_bias: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(NODE + GLOBAL + CANDIDATE, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 2)
        )
        self.graph = nn.Sequential(nn.Linear(2 * NODE + GLOBAL, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.wait_bias = wait_bias

    def forward(self, batch: CandidateGraph) -> PolicyOutput:
        num_candidates, of = len(batch.candidate_attr), batch.candidate_batch
        num_graphs = len(batch.global_features)
        place = scatter(
            batch.x[batch.placement_index[1]], batch.placement_candidate, 0, num_candidates, "mean"
        )
        rows = self.body(torch.cat([place, batch.global_features[of], batch.candidate_attr], 1))
        node_batch = batch.batch if batch.batch is not None else batch.x.new_zeros(len(batch.x)).long()
        pooled = [scatter(batch.x, node_batch, 0, num_graphs, how) for how in ("mean", "max")]
        value, urgency = self.graph(torch.cat([*pooled, batch.global_features], 1)).T
        logits = rows[:, 0] + self.wait_bias * batch.candidate_attr[:, 0]
        risk = rows[:, 1].sigmoid() * (1 - batch.candidate_attr[:, 0])
        return PolicyOutput(logits, value, nn.functional.softplus(urgency), risk)


def network(seed: int = 0, **kwargs: float) -> ToyNetwork:
    """A :class:`ToyNetwork` of known weights; torch's global random numbers stay as they are."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return ToyNetwork(**kwargs).eval()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choice:
    """A decision as the replay buffer takes it."""

    candidate: int
    logprob: float


@torch.no_grad()
def choose(policy: nn.Module, states: Sequence[CandidateGraph], generator: torch.Generator) -> list[tuple]:
    """Draw a candidate for each state: (action, logprob, value)."""
    joined = batch([PackedGraph.pack(state) for state in states])
    output = policy(joined)
    distribution = CandidateDistribution(
        output.logits, joined.candidate_mask, joined.candidate_batch, len(states)
    )
    actions = distribution.sample(generator)
    return list(
        zip(actions.tolist(), distribution.log_prob(actions).tolist(), output.value.tolist(), strict=True)
    )


def probabilities(policy: nn.Module, state: CandidateGraph) -> Tensor:
    """Of each candidate of one state [C]."""
    with torch.no_grad():
        logits = policy(state).logits
    return CandidateDistribution(logits, state.candidate_mask, state.candidate_batch, 1).probs


def bandit(num: int, rng: np.random.Generator) -> list[CandidateGraph]:
    """States in which the best candidate is the layer with the largest number; WAIT earns nothing."""
    return [graph(rng.uniform(-1, 1, size=rng.integers(2, 6)).tolist()) for _ in range(num)]


def bandit_reward(state: CandidateGraph, action: int) -> float:
    """The layer's number; 0 for WAIT."""
    return 0.0 if action == 0 else float(state.x[action - 1, 0])


def bandit_rollout(
    policy: nn.Module, num: int, rng: np.random.Generator, generator: torch.Generator
) -> list[Trajectory]:
    """Episodes of one decision."""
    states = bandit(num, rng)
    return [
        Trajectory([Transition.of(state, action, logprob, bandit_reward(state, action), value=value)])
        for state, (action, logprob, value) in zip(states, choose(policy, states, generator), strict=True)
    ]


EARLY, LATE = 0.0, 1.0


def timing_rollout(
    policy: nn.Module, num: int, rng: np.random.Generator, generator: torch.Generator
) -> list[Trajectory]:
    """Two decisions, of which one may act; each layer's number says whether early or late is right.

    Acting at the right one earns 1, at the wrong one -0.5, waiting twice nothing: the first WAIT is worth what
    can still be done later, which only a value that looks ahead knows. Acting always early earns 0.25.
    """
    ripe = rng.integers(0, 2, size=num)
    first = [graph([2.0 * r - 1.0], context=EARLY) for r in ripe]
    one = choose(policy, first, generator)
    second = [
        graph([2.0 * r - 1.0], context=LATE, unavailable=[1] if action else [])
        for r, (action, _, _) in zip(ripe, one, strict=True)
    ]
    two = choose(policy, second, generator)
    found = []
    for i, r in enumerate(ripe):
        steps = []
        for states, choices, right in ((first, one, r == EARLY), (second, two, r == LATE)):
            action, logprob, value = choices[i]
            reward = (1.0 if right else -0.5) if action else 0.0
            steps.append(Transition.of(states[i], action, logprob, reward, value=value))
        found.append(Trajectory(steps))
    return found


def delayed_rollout(
    policy: nn.Module, num: int, rng: np.random.Generator, generator: torch.Generator
) -> list[Trajectory]:
    """Two decisions: to act first costs 0.2 and earns 1 later, to act later costs 0.5; WAIT is wrong, then right."""
    del rng  # every episode is the same
    first, second = graph([0.5, 0.5], context=EARLY), graph([0.5, 0.5], context=LATE)
    found = []
    for one, two in zip(
        choose(policy, [first] * num, generator), choose(policy, [second] * num, generator), strict=True
    ):
        rewards = (-0.2 if one[0] else 0.0, (1.0 if one[0] else 0.0) - (0.5 if two[0] else 0.0))
        found.append(
            Trajectory(
                [
                    Transition.of(state, action, logprob, reward, value=value)
                    for state, (action, logprob, value), reward in zip(
                        (first, second), (one, two), rewards, strict=True
                    )
                ]
            )
        )
    return found
