"""The six components of a reward, each measured against the control and bounded.

With L the loss, P the parameters and C the training cost of the run with the adaptation (a) and of its
control (c), s the loss scale and λ the price:

========== ================================================================= =========
accuracy   tanh((L_c − L_a) / s′)                                            [−1, 1]
speed      log2(C_c(L*) / C_a(L*)), L* = max(L_a, L_c), clipped, · s / s′    [−1, 1]
memory     −tanh(max(λ, λ_floor) · log(P_a / P_c) / s)                       [−1, 1]
stability  tanh((σ_c − σ_a) / s)                                             [−1, 1]
safety     −min(1, Σ penalty · events beyond the control's)                  [−1, 0]
innovation decay^k for the first success of the run's k-th kind, else 0      [0, 1]
========== ================================================================= =========

s′ = √(s² + se²), with se the standard error of a fitted control's last loss, 0 for a real one: what is not
known well counts little. C(L*) is the cost after which the loss stays at or below L*, σ the standard deviation of
the loss's change from one measured point to the next. Without an adaptation all of them are 0. A loss of NaN or inf
counts as −1 in accuracy, speed and stability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from esper.tamiyo.rewards.branch import Branch, Outcome, kind_of
from esper.tamiyo.rewards.config import RewardConfig

__all__ = ["accuracy", "innovation", "memory", "safety", "speed", "stability", "succeeded", "utility"]


def utility(taken: Branch, control: Branch, price: float) -> float:
    """U = (L_c − L_a) − λ·log(P_a / P_c), in nats: what the oracle ranks by. −inf for a loss that is not finite."""
    if not math.isfinite(taken.last_loss):
        return -math.inf
    return control.last_loss - taken.last_loss - price * _log_size(taken, control)


def accuracy(taken: Branch, control: Branch, config: RewardConfig, stderr: float = 0.0) -> float:
    """Loss saved against the control, in loss scales, squashed.

    Args:
        taken: With the adaptation.
        control: Without it.
        config: The scale.
        stderr: Standard error of the control's last loss, in nats.
    """
    if not math.isfinite(taken.last_loss):
        return -1.0
    return math.tanh((control.last_loss - taken.last_loss) / math.hypot(config.loss_scale, stderr))


def speed(taken: Branch, control: Branch, config: RewardConfig, stderr: float = 0.0) -> float:
    """Doublings of cost saved on the way to the worse of the two final losses, which both reach.

    Only the last crossing counts, after which the loss stays there: a dip on the way buys nothing.

    Args:
        taken: With the adaptation.
        control: Without it.
        config: Which cost.
        stderr: Standard error of the control's last loss, in nats.
    """
    if not math.isfinite(taken.last_loss):
        return -1.0
    if not math.isfinite(control.last_loss):
        return 1.0
    aim = max(taken.last_loss, control.last_loss)
    spent, spent_by_control = (
        _cost_to(branch.losses, _costs(branch, config), aim) for branch in (taken, control)
    )
    whole = max(_costs(taken, config)[-1], _costs(control, config)[-1])
    if whole <= 0:
        return 0.0
    # Both may stand at the aim from the start; a thousandth of the whole cost is the least that is told apart.
    least = whole / 1000
    certainty = config.loss_scale / math.hypot(config.loss_scale, stderr)
    return certainty * _clip(math.log2(max(spent_by_control, least) / max(spent, least)))


def memory(taken: Branch, control: Branch, config: RewardConfig, price: float) -> float:
    """Price of the parameters added, in loss scales, squashed; positive where the model has shrunk."""
    return -math.tanh(max(price, config.price_floor) * _log_size(taken, control) / config.loss_scale)


def stability(taken: Branch, control: Branch, config: RewardConfig, control_noise: float = 0.0) -> float:
    """Unrest of the loss spared against the control, in loss scales, squashed.

    Args:
        taken: With the adaptation.
        control: Without it.
        config: The scale.
        control_noise: Standard deviation in nats that the control's losses lack because they are fitted.
    """
    if not all(map(math.isfinite, taken.losses)):
        return -1.0
    # a change is the difference of two losses, so independent noise enters it twice
    usual = math.hypot(_unrest(control.losses), math.sqrt(2) * control_noise)
    return math.tanh((usual - _unrest(taken.losses)) / config.loss_scale)


def safety(taken: Branch, control: Branch, config: RewardConfig) -> float:
    """Penalties for what went wrong and would not have without the adaptation."""
    penalties = (
        (config.rollback_penalty, taken.rollbacks - control.rollbacks),
        (config.cull_penalty, taken.culls - control.culls),
        (config.non_finite_penalty, taken.non_finite - control.non_finite),
    )
    return 0.0 - min(1.0, sum(penalty * max(0, events) for penalty, events in penalties))


def succeeded(outcome: Outcome, config: RewardConfig) -> bool:
    """Whether the run was better for the adaptation, by more than the control's error, and nothing went wrong."""
    control, taken = outcome.control, outcome.taken
    if outcome.is_wait or control is None:
        return False
    error = outcome.control_stderr[-1] if outcome.control_stderr else 0.0
    gained = utility(taken, control, max(outcome.price, config.price_floor))
    return gained > config.success_stderrs * error and safety(taken, control, config) == 0.0


def innovation(outcome: Outcome, config: RewardConfig, known: Collection[str]) -> float:
    """decay^k for a success of a kind that is not among the k ``known`` ones, else 0.

    Over a run this sums to at most 1 / (1 − decay), however much is tried: trying is not rewarded, and what has
    worked once is not new again.
    """
    if kind_of(outcome.candidate) in known or not succeeded(outcome, config):
        return 0.0
    return float(config.innovation_decay ** len(known))


def _log_size(taken: Branch, control: Branch) -> float:
    return math.log(max(1, taken.num_parameters) / max(1, control.num_parameters))


def _costs(branch: Branch, config: RewardConfig) -> Sequence[float]:
    return branch.training_flops if config.speed_cost == "flops" else branch.seconds


def _cost_to(losses: Sequence[float], costs: Sequence[float], aim: float) -> float:
    """Cost after which ``losses`` stay at or below ``aim``, between two points by a straight line."""
    i = len(losses) - 1
    assert losses[i] <= aim
    while i > 0 and losses[i - 1] <= aim:
        i -= 1
    if i == 0:
        return costs[0]
    above, below = losses[i - 1], losses[i]
    if not math.isfinite(above):
        return costs[i]
    return costs[i - 1] + (costs[i] - costs[i - 1]) * (above - aim) / (above - below)


def _unrest(losses: Sequence[float]) -> float:
    """Standard deviation of the changes from point to point; 0 where there are fewer than two."""
    changes = [b - a for a, b in itertools.pairwise(losses) if math.isfinite(a + b)]
    if len(changes) < 2:
        return 0.0
    mean = sum(changes) / len(changes)
    return math.sqrt(sum((change - mean) ** 2 for change in changes) / (len(changes) - 1))


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))
