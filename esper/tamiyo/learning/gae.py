"""Generalised advantage estimation over whole trajectories."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError

__all__ = ["gae"]

Floats = NDArray[np.float64]


def gae(
    rewards: Floats, values: Floats, final_value: float, *, gamma: float, gae_lambda: float
) -> tuple[Floats, Floats]:
    """Estimate advantages and λ-returns of one trajectory (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    .. math::
        \\delta_t = r_t + \\gamma V(s_{t+1}) - V(s_t), \\qquad
        A_t = \\delta_t + \\gamma \\lambda A_{t+1}, \\qquad G_t = A_t + V(s_t)

    Args:
        rewards: Of each decision [T], T ≥ 1.
        values: V(s_t) of the state that each decision was made in [T].
        final_value: V(s_T), bootstrapped from where the trajectory was cut off; 0 where the episode ended.
        gamma: Discount a decision.
        gae_lambda: λ; 0 gives one-step TD errors, 1 Monte-Carlo returns less the baseline.

    Returns:
        Advantages [T] and returns [T], float64.

    Raises:
        DataFormatError: Shapes differ or are empty, or a number is NaN or inf.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape or rewards.size == 0:
        raise DataFormatError(
            f"expected rewards and values [T] of one trajectory, T >= 1, got {rewards.shape} and {values.shape}"
        )
    following = np.append(values[1:], final_value)
    deltas = rewards + gamma * following - values
    if not np.isfinite(deltas).all():
        raise DataFormatError(
            f"expected finite rewards and values, got NaN or inf at decision {int(np.argmin(np.isfinite(deltas)))} "
            f"of {rewards.size}; the run diverged or the critic did: give a finite penalty instead"
        )
    advantages = np.empty_like(deltas)
    running = 0.0
    for t in range(deltas.size - 1, -1, -1):
        running = deltas[t] + gamma * gae_lambda * running
        advantages[t] = running
    return advantages, advantages + values
