"""Losses of policy, value and heads, as free functions.

Shape legend: ``B`` transitions (one graph each), ``C`` candidates of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.tamiyo.network.distribution import CandidateDistribution, log_available

__all__ = [
    "PolicyLoss",
    "clipped_policy_loss",
    "decoupled_policy_loss",
    "disagreement",
    "masked_mean",
    "normalised",
    "risk_loss",
    "urgency_loss",
]


class PolicyLoss(NamedTuple):
    """A surrogate objective and what it went by.

    Attributes:
        loss: Negative objective of each transition [B].
        log_ratio: log π_θ/π_prox [B].
        importance: π_prox/π_behaviour as used [B], without gradient.
        clipped: Where the clipped side was the smaller one, so that no gradient flows [B], bool.
    """

    loss: Tensor
    log_ratio: Tensor
    importance: Tensor
    clipped: Tensor


def decoupled_policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float,
    max_importance_ratio: float = float("inf"),
) -> PolicyLoss:
    """Decoupled clipped objective (Hilton, Cobbe, Schulman 2022, arXiv 2110.00641, eq. 5).

    .. math::
        -\\frac{\\pi_{prox}}{\\pi_{behav}} \\min\\left(r A, \\mathrm{clip}(r, 1-\\epsilon, 1+\\epsilon) A\\right),
        \\qquad r = \\frac{\\pi_\\theta}{\\pi_{prox}}

    The trust region lies around the proximal policy, however old the data are; the first factor corrects for who
    acted. Deviation: that factor is truncated, as ρ̄ in V-trace (Espeholt et al. 2018), which bounds the
    variance of very old data at the price of some bias. Where proximal and behaviour policy are one this is PPO.

    Args:
        logprobs: Of the taken candidates under the policy in training [B].
        proximal_logprobs: Under the proximal policy [B].
        behaviour_logprobs: Under the policy that took them [B].
        advantages: [B].
        clip_ratio: ε.
        max_importance_ratio: Where the correction is truncated.
    """
    proximal_logprobs = proximal_logprobs.detach()
    importance = (proximal_logprobs - behaviour_logprobs).exp().clamp(max=max_importance_ratio)
    log_ratio = logprobs - proximal_logprobs
    ratio = log_ratio.exp()
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
    return PolicyLoss(-importance * torch.min(free, clipped), log_ratio, importance, clipped < free)


def clipped_policy_loss(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, *, clip_ratio: float
) -> PolicyLoss:
    """PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7): the naive use of old data.

    Args:
        logprobs: Of the taken candidates under the policy in training [B].
        behaviour_logprobs: Under the policy that took them [B].
        advantages: [B].
        clip_ratio: ε.
    """
    return decoupled_policy_loss(
        logprobs, behaviour_logprobs, behaviour_logprobs, advantages, clip_ratio=clip_ratio
    )


def normalised(advantages: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over a minibatch [B]; as they are when there is only one."""
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0 where that is nowhere."""
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum().clamp(min=1)


def urgency_loss(urgency: Tensor, measured: Tensor) -> Tensor:
    """Huber loss of the urgency head where the cost of waiting was measured.

    Args:
        urgency: Predicted, in nats [B].
        measured: In nats [B]; NaN where it was not.
    """
    known = ~measured.isnan()
    return masked_mean(F.smooth_l1_loss(urgency, measured.nan_to_num(), reduction="none", beta=0.1), known)


def risk_loss(risk: Tensor, harm: Tensor) -> Tensor:
    """Cross-entropy of the risk head where it is known whether a candidate did harm.

    Args:
        risk: Predicted probability of harm [n].
        harm: 0, 1 or a measured share [n]; NaN where it is not known.
    """
    known = ~harm.isnan()
    # a sigmoid that rounds to 0 or 1 would have no finite loss, and no gradient to come back by
    risk = risk.clamp(1e-6, 1 - 1e-6)
    return masked_mean(F.binary_cross_entropy(risk, harm.nan_to_num(), reduction="none"), known)


def disagreement(dropped: CandidateDistribution, whole: CandidateDistribution) -> Tensor:
    """KL divergence of a dropout draw of the policy from the policy without dropout, over log K [B].

    Its mean over draws is the mutual information of candidate and weights, in the units of
    :class:`~esper.tamiyo.network.uncertainty.Uncertainty`, as far as the network without dropout is the mean over
    draws (Gal 2016, §3.3.1); one draw estimates it without bias. K is the number of available candidates.
    """
    # the masked entries of both are -inf, and their difference NaN
    gap = torch.where(whole.mask, dropped.logprobs, 0.0) - torch.where(whole.mask, whole.logprobs, 0.0)
    kl = gap.new_zeros(whole.num_graphs).index_add(0, whole.candidate_batch, dropped.probs * gap)
    return kl / log_available(whole.num_available)
