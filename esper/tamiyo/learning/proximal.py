"""The proximal policy: an exponentially weighted average of the weights, which is the target network too."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["ProximalPolicy"]


class ProximalPolicy:
    """Average of a policy's weights (PPO-EWMA, Hilton et al. 2022, §4), without bias to where it began.

    After k steps the weights are ``Σ_j β^j θ_{k−j} / Σ_j β^j``, j from 0 (the newest) to k (the weights at first),
    so that the early average is a plain mean and not mostly the weights that training began with.

    Args:
        policy: Copied; buffers follow it at every step.
        decay: β in [0, 1).
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(policy).eval().requires_grad_(False)
        self.decay = decay
        self.total_weight = 1.0

    @torch.no_grad()
    def average(self, policy: nn.Module) -> None:
        """Take one step towards the weights of ``policy``."""
        self.total_weight = self.decay * self.total_weight + 1.0
        for mine, new in zip(self.network.parameters(), policy.parameters(), strict=True):
            mine.data.lerp_(new, 1.0 / self.total_weight)
        for held, current in zip(self.network.buffers(), policy.buffers(), strict=True):
            held.copy_(current)
