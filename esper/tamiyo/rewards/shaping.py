"""Potential-based shaping: the only kind that leaves the best policy the best.

F(s, s') = γ·Φ(s') − Φ(s) (Ng, Harada and Russell 1999, theorem 1), with Φ = 0 at the end of an episode. Summed over
an episode it telescopes to −Φ(s_0), whatever was done: no loop of decisions earns anything by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.errors import ConfigError
from esper.tamiyo.graph.facts import RunFacts
from esper.tamiyo.rewards.config import RewardConfig

__all__ = ["potential", "shape", "shaping"]


def shaping(potential_before: float, potential_after: float, *, gamma: float, terminated: bool) -> float:
    """F(s, s') for one transition.

    Args:
        potential_before: Φ(s).
        potential_after: Φ(s'); not read when ``terminated``.
        gamma: Discount of the rewards that it is added to; any other would change the best policy.
        terminated: s' is the end. An episode that was merely cut off (truncated) goes on, so it keeps its Φ.
    """
    return (0.0 if terminated else gamma * potential_after) - potential_before


def shape(
    rewards: Sequence[float], potentials: Sequence[float], *, gamma: float, terminated: bool
) -> list[float]:
    """Add the shaping term to every reward of an episode.

    Args:
        rewards: Of T transitions.
        potentials: Φ of the T + 1 states.
        gamma: Discount.
        terminated: The last state is the end, and not where the episode was cut off.

    Raises:
        ConfigError: Not one potential more than rewards, or one that is not finite.
    """
    if len(potentials) != len(rewards) + 1:
        raise ConfigError(
            f"shape: expected {len(rewards) + 1} potentials for {len(rewards)} rewards, got {len(potentials)}"
        )
    if not all(map(math.isfinite, potentials)):
        raise ConfigError(f"shape: expected finite potentials, got {list(potentials)}")
    last = len(rewards) - 1
    return [
        reward + shaping(before, after, gamma=gamma, terminated=terminated and i == last)
        for i, (reward, before, after) in enumerate(zip(rewards, potentials, potentials[1:], strict=False))
    ]


def potential(run: RunFacts, config: RewardConfig) -> float:
    """Φ(s): what the state's own loss and size are worth, on the scale of a reward's total; bounded.

    −tanh(L / (10 s)) · w_accuracy − tanh(max(λ, λ_floor)·log(P / P_host) / s) · w_memory. The loss is the held-out
    one, else the last mean training loss; a state without any has the worst.
    """
    loss = run.held_out_loss
    if loss is None:
        loss = run.train_losses[-1] if run.train_losses else math.inf
    if math.isnan(loss):
        loss = math.inf
    price = max(run.price, config.price_floor)
    size = math.log(max(1, run.num_parameters) / max(1, run.host_parameters))
    # Losses of whole nats must still be told apart, where a gain of one loss scale already counts as much.
    return -config.accuracy * math.tanh(loss / (10 * config.loss_scale)) - config.memory * math.tanh(
        price * size / config.loss_scale
    )
