"""Settings of the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from esper.errors import ConfigError

__all__ = ["COMPONENTS", "HORIZONS", "Horizon", "RewardConfig"]

Horizon = Literal["short", "medium", "long"]
HORIZONS: tuple[Horizon, ...] = ("short", "medium", "long")
"""From the nearest to the furthest."""

COMPONENTS = ("accuracy", "speed", "memory", "stability", "safety", "innovation")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights, horizons and scales.

    Attributes:
        accuracy, speed, memory, stability, safety, innovation: Weight of each component; the Tamiyo document's.
        short, medium, long: Horizons as shares of the whole run, counted from the decision; one that
            would end after the run ends with it.
        short_weight, medium_weight, long_weight: Of the horizons in the total. The early ones weigh nothing by
            default: the next few hundred steps are a misleading objective (GROWTH.md §5), and what they
            tell early belongs into a potential (:mod:`esper.tamiyo.rewards.shaping`), which leaves the best
            policy the best.
        loss_scale: Nats of held-out loss at which accuracy, memory and stability reach tanh(1) = 0.76.
        price_floor: Least price λ of parameters, in nats per unit of log(parameters / the control's): where
            a run names none, parameters still cost something.
        speed_cost: What a loss is reached in: training ``flops``, or ``seconds`` (which differ between machines).
        rollback_penalty, cull_penalty, non_finite_penalty: Of safety, for each such event.
        innovation_decay: Factor on the reward of each further kind of adaptation that first succeeds in a run.
        success_stderrs: Standard errors of the control by which a gain must exceed zero to count as success.
        min_fit_points: Losses before a decision without which nothing is extrapolated.
    """

    accuracy: float = 0.25
    speed: float = 0.20
    memory: float = 0.15
    stability: float = 0.20
    safety: float = 0.15
    innovation: float = 0.05
    short: float = 0.05
    medium: float = 0.25
    long: float = 1.0
    short_weight: float = 0.0
    medium_weight: float = 0.0
    long_weight: float = 1.0
    loss_scale: float = 0.1
    price_floor: float = 0.01
    speed_cost: Literal["flops", "seconds"] = "flops"
    rollback_penalty: float = 0.5
    cull_penalty: float = 0.25
    non_finite_penalty: float = 1.0
    innovation_decay: float = 0.5
    success_stderrs: float = 2.0
    min_fit_points: int = 6

    def __post_init__(self) -> None:
        mistakes = []
        for name in (*COMPONENTS, *(f"{h}_weight" for h in HORIZONS), *_NOT_NEGATIVE):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                mistakes.append(f"{name} should be a finite number of at least 0, got {value!r}")
        if not _is_number(self.loss_scale) or self.loss_scale <= 0:
            mistakes.append(f"loss_scale should be a positive number, got {self.loss_scale!r}")
        if not mistakes and not any(getattr(self, name) for name in COMPONENTS):
            mistakes.append("one component at least should have a weight, all are 0")
        if not mistakes and not any(self.horizon_weight(h) for h in HORIZONS):
            mistakes.append("one horizon at least should have a weight, all are 0")
        shares = [self.short, self.medium, self.long]
        if not (all(map(_is_number, shares)) and 0 < self.short < self.medium < self.long <= 1):
            mistakes.append(f"horizons should be shares, 0 < short < medium < long <= 1, got {shares}")
        if not (_is_number(self.innovation_decay) and 0 <= self.innovation_decay < 1):
            mistakes.append(f"innovation_decay should lie in [0, 1), got {self.innovation_decay!r}")
        if self.speed_cost not in ("flops", "seconds"):
            mistakes.append(f"speed_cost should be 'flops' or 'seconds', got {self.speed_cost!r}")
        if not isinstance(self.min_fit_points, int) or self.min_fit_points < 5:
            mistakes.append(
                f"min_fit_points should be a whole number of at least 5, got {self.min_fit_points!r}"
            )
        if mistakes:
            raise ConfigError(f"RewardConfig: {'; '.join(mistakes)}")

    def weight(self, component: str) -> float:
        """Weight of ``component``."""
        return float(getattr(self, component))

    def horizon_share(self, horizon: Horizon) -> float:
        """Length of ``horizon`` as a share of the run."""
        return float(getattr(self, horizon))

    def horizon_weight(self, horizon: Horizon) -> float:
        """Weight of ``horizon`` in the total."""
        return float(getattr(self, f"{horizon}_weight"))


_NOT_NEGATIVE = (
    "price_floor", "rollback_penalty", "cull_penalty", "non_finite_penalty", "success_stderrs",
)  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
