"""Settings of learning, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from esper.errors import ConfigError

__all__ = ["SupervisedConfig", "TrainingConfig", "check"]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of :class:`esper.tamiyo.learning.trainer.PolicyTrainer`.

    Attributes:
        learning_rate: Of AdamW at the start.
        weight_decay: Of AdamW.
        adam_epsilon: Of AdamW.
        batch_size: Transitions a minibatch.
        num_training_steps: Optimizer steps of a whole training; over them the importance exponent anneals.
        gradient_clip_norm: Largest norm of the whole gradient.
        target_update_freq: Optimizer steps between two steps of the proximal policy's average. The design document's
            100 holds the trust region back: a bandit of graphs took 308 steps to 80 % of its optimum (and, with
            other first weights, more than the 460 it was given); with 1 and a ``proximal_decay`` of .889, as in
            Hilton et al., 44 and 60.
        proximal_decay: β of that average (Hilton et al. 2022, §4); 0 copies the weights.
        ppo_epochs: Passes over the fresh transitions an update.
        clip_ratio: ε: how far the ratio to the proximal policy may move before its gradient stops.
        max_importance_ratio: Largest correction from behaviour to proximal policy (ρ̄ of Espeholt et al. 2018).
        value_loss_coeff: Weight of the squared error of the value.
        entropy_bonus_coeff: Weight of the entropy over available candidates, in nats.
        gamma: Discount a decision.
        gae_lambda: λ of generalised advantage estimation.
        urgency_loss_weight: Weight of the Huber loss of the urgency head on measured costs of waiting.
        safety_loss_weight: Weight of everything about harm: the risk head's cross-entropy on measured
            outcomes, and the safety penalty.
        safety_penalty_weight: Weight, within that, of the probability that the policy gives to risky candidates.
        risk_threshold: Predicted probability of harm from which on a candidate is penalised, by the excess. An
            untrained risk head says about one half of everything; a threshold below that would teach WAIT.
        uncertainty_regularization: Weight of the disagreement between two dropout passes above the threshold.
        epistemic_threshold: Disagreement that is let pass: mutual information over log K, in the units of
            ``PolicyConfig.uncertainty_threshold``.
        replay_capacity: Transitions kept.
        replay_fraction: Share of each minibatch of an update drawn from older transitions.
        priority_exponent: α: 0 draws uniformly, 1 in proportion to the TD error (Schaul et al. 2016, eq. 1).
        priority_epsilon: Added to every |TD error|, so that nothing is never drawn.
        importance_exponent: β at the start; it rises linearly to 1 (ibid., §3.4).
        lr_scheduler_factor: The learning rate times this when the return has stopped rising.
        lr_scheduler_patience: Observed returns without a better one before that.
        return_smoothing: Decay of the average over observed returns that scheduler and stopping look at.
        early_stopping_patience: Observed returns without a better one before training ends.
        min_improvement: What counts as better, in units of return.
        seed: Of shuffling, drawing and dropout.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    adam_epsilon: float = 1e-5
    batch_size: int = 64
    num_training_steps: int = 100_000
    gradient_clip_norm: float = 0.5
    target_update_freq: int = 100
    proximal_decay: float = 0.5
    ppo_epochs: int = 4
    clip_ratio: float = 0.2
    max_importance_ratio: float = 10.0
    value_loss_coeff: float = 0.5
    entropy_bonus_coeff: float = 0.01
    gamma: float = 0.99
    gae_lambda: float = 0.95
    urgency_loss_weight: float = 0.25
    safety_loss_weight: float = 1.0
    safety_penalty_weight: float = 2.0
    risk_threshold: float = 0.5
    uncertainty_regularization: float = 0.1
    epistemic_threshold: float = 0.2
    replay_capacity: int = 50_000
    replay_fraction: float = 0.5
    priority_exponent: float = 0.6
    priority_epsilon: float = 1e-3
    importance_exponent: float = 0.4
    lr_scheduler_factor: float = 0.5
    lr_scheduler_patience: int = 20
    return_smoothing: float = 0.9
    early_stopping_patience: int = 100
    min_improvement: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "learning_rate",
            "batch_size",
            "num_training_steps",
            "gradient_clip_norm",
            "target_update_freq",
            "ppo_epochs",
            "clip_ratio",
            "adam_epsilon",
            "replay_capacity",
            "priority_epsilon",
            "lr_scheduler_patience",
            "early_stopping_patience",
        )
        weights = (
            "weight_decay",
            "value_loss_coeff",
            "entropy_bonus_coeff",
            "urgency_loss_weight",
            "safety_loss_weight",
            "safety_penalty_weight",
            "uncertainty_regularization",
            "epistemic_threshold",
            "min_improvement",
            "seed",
        )
        fractions = (
            "gamma",
            "gae_lambda",
            "priority_exponent",
            "importance_exponent",
        )
        below_one = (
            "proximal_decay",
            "risk_threshold",
            "replay_fraction",
            "return_smoothing",
        )
        check(
            self,
            *((getattr(self, name) > 0, f"{name} should be positive") for name in positive),
            *((getattr(self, name) >= 0, f"{name} should not be negative") for name in weights),
            *((0 <= getattr(self, name) <= 1, f"{name} should lie in [0, 1]") for name in fractions),
            *((0 <= getattr(self, name) < 1, f"{name} should lie in [0, 1)") for name in below_one),
            (self.clip_ratio < 1, "clip_ratio should be below 1"),
            (self.max_importance_ratio >= 1, "max_importance_ratio should be at least 1"),
            (0 < self.lr_scheduler_factor < 1, "lr_scheduler_factor should lie in (0, 1)"),
        )


@dataclass(frozen=True)
class SupervisedConfig:
    """Settings of :func:`esper.tamiyo.learning.supervised.fit`.

    Attributes:
        temperature: τ in nats: a logit is a utility over τ, so the softmax over logits is a policy as soft as
            differences of τ are small.
        learning_rate: Of AdamW, at its peak; it warms up over the first epoch and falls along a cosine.
        weight_decay: Of AdamW.
        batch_size: Decision points a minibatch.
        max_epochs: Passes over the training rows at most.
        keep: ``best``: stop early, with the weights of the epoch of the smallest loss on the validation rows;
            ``last``: those at the end of the cosine. On the oracle table the loss of a network that was sure too
            soon rises from the fifth epoch on while its choices become better for thirty more.
        patience: Epochs without a smaller loss on the validation rows before stopping, where the best is kept.
        gradient_clip_norm: Largest norm of the whole gradient.
        huber_delta: Error in nats from which on the regression loss grows linearly.
        stderr_floor: Added in squares to every standard error, in nats: what a utility cannot be known better than.
        listwise_weight: Weight of the cross-entropy to softmax(utility / τ).
        value_weight: Weight of the Huber loss of the value head against the soft policy's utility, in units of τ.
        risk_weight: Weight of the risk head's cross-entropy where harm was measured.
        urgency_weight: Weight of the Huber loss of the urgency head where the cost of waiting was measured.
        seed: Of shuffling and dropout.
    """

    temperature: float = 0.05
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 32
    max_epochs: int = 60
    keep: Literal["best", "last"] = "best"
    patience: int = 12
    gradient_clip_norm: float = 1.0
    huber_delta: float = 0.1
    stderr_floor: float = 0.01
    listwise_weight: float = 1.0
    value_weight: float = 0.25
    risk_weight: float = 0.25
    urgency_weight: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "temperature",
            "learning_rate",
            "batch_size",
            "max_epochs",
            "patience",
            "gradient_clip_norm",
            "huber_delta",
            "stderr_floor",
        )
        weights = (
            "weight_decay",
            "listwise_weight",
            "value_weight",
            "risk_weight",
            "urgency_weight",
            "seed",
        )
        check(
            self,
            *((getattr(self, name) > 0, f"{name} should be positive") for name in positive),
            *((getattr(self, name) >= 0, f"{name} should not be negative") for name in weights),
            (self.keep in ("best", "last"), "keep should be 'best' or 'last'"),
        )


def check(owner: object, *conditions: tuple[bool, str]) -> None:
    """Raise one :class:`ConfigError` with all that is wrong about ``owner``."""
    wrong = [message for holds, message in conditions if not holds]
    if wrong:
        raise ConfigError(f"{type(owner).__name__}: {'; '.join(wrong)}; got {owner}")
