"""What one optimizer step descends: all losses of a minibatch, weighed and added."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.learning.config import TrainingConfig
from esper.tamiyo.learning.loss import (
    decoupled_policy_loss,
    disagreement,
    normalised,
    risk_loss,
    urgency_loss,
)
from esper.tamiyo.learning.minibatch import Minibatch
from esper.tamiyo.network.distribution import CandidateDistribution
from esper.tamiyo.network.safety import known_risk, safety_penalty

__all__ = ["Objective", "objective"]


class Objective(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: To descend.
        losses: Its terms by name, before their weights.
        metrics: Beside them.
        values: Of the states, as the policy's critic says [B], without gradient.
        errors: TD errors ``target − value`` [B], without gradient.
    """

    total: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor | float]
    values: Tensor
    errors: Tensor


def objective(
    policy: nn.Module,
    proximal: nn.Module,
    minibatch: Minibatch,
    config: TrainingConfig,
    *,
    dropout_seed: int,
) -> Objective:
    """Weigh policy, value, entropy, urgency, risk, safety and uncertainty.

    The value's error is not clipped as in some PPOs: that was found to hurt or do nothing (Andrychowicz et al. 2021,
    §3.6).

    Args:
        policy: In training, in eval mode: ratios are taken without dropout, as rollouts are.
        proximal: Middle of the trust region, and target network of the value.
        minibatch: Transitions.
        config: Weights.
        dropout_seed: Of the one pass with dropout.
    """
    graphs = minibatch.graphs
    output = policy(graphs)
    current = _distribution(output.logits, graphs)
    with torch.no_grad():
        target = proximal(graphs)
        middle = _distribution(target.logits, graphs)
    fresh = ~minibatch.advantages.isnan()
    surrogate = decoupled_policy_loss(
        current.log_prob(minibatch.actions),
        middle.log_prob(minibatch.actions),
        minibatch.logprobs,
        normalised(torch.where(fresh, minibatch.advantages, minibatch.targets - target.value)),
        clip_ratio=config.clip_ratio,
        max_importance_ratio=config.max_importance_ratio,
    )
    errors = minibatch.targets - output.value
    chosen = current.flat(minibatch.actions)
    measured = torch.full_like(output.risk, math.nan).index_put((chosen,), minibatch.risk)
    losses = {
        "policy": (minibatch.weights * surrogate.loss).mean(),
        "value": (minibatch.weights * errors.square()).mean(),
        "urgency": urgency_loss(output.urgency, minibatch.urgency),
        "risk": risk_loss(output.risk[chosen], minibatch.risk),
        "safety": safety_penalty(current, known_risk(output.risk, measured), config.risk_threshold),
        "uncertainty": _uncertainty(policy, graphs, current, config, dropout_seed),
    }
    entropy = current.entropy.mean()
    total = (
        losses["policy"]
        + config.value_loss_coeff * losses["value"]
        - config.entropy_bonus_coeff * entropy
        + config.urgency_loss_weight * losses["urgency"]
        + config.safety_loss_weight * (losses["risk"] + config.safety_penalty_weight * losses["safety"])
        + config.uncertainty_regularization * losses["uncertainty"]
    )
    wait = current.flat(torch.zeros_like(minibatch.actions))
    log_ratio, importance = surrogate.log_ratio.detach(), surrogate.importance
    metrics: dict[str, Tensor | float] = {
        "entropy": entropy.detach(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
        "clip_fraction": surrogate.clipped.float().mean(),
        "importance/mean": importance.mean(),
        "importance/max": importance.max(),
        "importance/truncated": (importance >= config.max_importance_ratio).float().mean(),
        "replay/age": math.nan if bool(fresh.all()) else minibatch.ages[~fresh].mean(),
        "wait_fraction": current.probs[wait].detach().mean(),
    }
    return Objective(total, losses, metrics, output.value.detach(), errors.detach())


def _uncertainty(
    policy: nn.Module,
    graphs: CandidateGraph,
    current: CandidateDistribution,
    config: TrainingConfig,
    seed: int,
) -> Tensor:
    """How much a dropout draw disagrees beyond what is let pass, on average over graphs."""
    if config.uncertainty_regularization == 0:
        return current.probs.new_zeros(())
    device = current.probs.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        policy.train()
        try:
            dropped = _distribution(policy(graphs).logits, graphs)
        finally:
            policy.eval()
    return (disagreement(dropped, current) - config.epistemic_threshold).clamp(min=0.0).mean()


def _distribution(logits: Tensor, graphs: CandidateGraph) -> CandidateDistribution:
    return CandidateDistribution(
        logits, graphs.candidate_mask, graphs.candidate_batch, len(graphs.global_features)
    )
