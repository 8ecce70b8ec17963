"""What the service checks before a choice leaves it: confidence, uncertainty, noise, cooldown, rate.

A gate turns a choice into WAIT and says so; it never makes one. Cooldown and rate are about adaptations that add or
renew units; a cull, which undoes one, and a hold, which postpones one, are never held up by them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.tamiyo.graph.facts import Candidate, DecisionPoint
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.deciders import Choice

__all__ = ["Cadence", "adds", "closed_gate", "measurement_noise"]

_FEWEST = 4
"""Losses that two independent second differences need."""


@dataclass
class Cadence:
    """When one run was last adapted.

    Attributes:
        adapted_at: Request id -> Unix seconds, of the adaptations that limits still count, oldest first.
    """

    adapted_at: dict[str, float] = field(default_factory=dict)

    def note(self, request_id: str, candidate: Candidate, now: float) -> None:
        """Count an adaptation, if this is one."""
        if adds(candidate):
            self.adapted_at[request_id] = now

    def undo(self, request_id: str) -> None:
        """Count an adaptation no more: it was not stored, or the run did not carry it out."""
        self.adapted_at.pop(request_id, None)

    def forget(self, before: float) -> None:
        """Drop those before a moment in Unix seconds."""
        self.adapted_at = {name: at for name, at in self.adapted_at.items() if at >= before}


def adds(candidate: Candidate) -> bool:
    """Whether a candidate adds or renews units, which cooldown and rate are about."""
    return candidate.action in ("grow", "recycle")


def closed_gate(
    point: DecisionPoint, choice: Choice, cadence: Cadence, config: ServiceConfig, now: float
) -> tuple[str, str]:
    """Which gate is closed to a choice, and why; two empty texts when it may pass.

    Args:
        point: What was decided on.
        choice: What the decider would do.
        cadence: Earlier adaptations of the run; those that no longer count are dropped.
        config: The thresholds.
        now: Unix seconds.
    """
    candidate = point.candidates[choice.candidate]
    if candidate.action == "wait":
        return "", ""
    if choice.confidence < config.min_confidence:
        return "confidence", f"confidence {choice.confidence:.2f} is below {config.min_confidence:g}"
    if choice.uncertainty > config.max_uncertainty:
        return "uncertainty", f"uncertainty {choice.uncertainty:.3g} is above {config.max_uncertainty:g}"
    if not adds(candidate):
        return "", ""
    noise = measurement_noise(point.run.train_losses)
    if noise > config.max_noise:
        return "noise", f"the losses scatter by {noise:.0%} of their level, more than {config.max_noise:.0%}"
    cadence.forget(now - max(config.rate_window_s, config.cooldown_s))
    last = max(cadence.adapted_at.values(), default=-math.inf)
    if now - last < config.cooldown_s:
        return "cooldown", f"the last adaptation is {now - last:.1f} s ago, less than {config.cooldown_s:g} s"
    recent = sum(now - moment <= config.rate_window_s for moment in cadence.adapted_at.values())
    if recent >= config.max_adaptations:
        return "rate", f"{recent} adaptations within {config.rate_window_s:g} s, as many as are allowed"
    return "", ""


def measurement_noise(losses: Sequence[float]) -> float:
    """Scatter of a series of losses around its own smooth course, over its level.

    The scale is the median absolute second difference, in standard deviations of independent noise (divided by
    0.6745·√6): a straight line has none, however steep, and a single jump (data that shift, a new learning rate)
    moves a median little. A run whose loss is high, or rises, is not noisy.

    Args:
        losses: Oldest first; what is not finite is left out.

    Returns:
        0 for fewer than four, which cannot tell.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < _FEWEST:
        return 0.0
    bends = [abs(c - 2.0 * b + a) for a, b, c in zip(finite, finite[1:], finite[2:], strict=False)]
    level = statistics.median(abs(loss) for loss in finite)
    scatter = statistics.median(bends) / (0.6745 * math.sqrt(6.0))
    return scatter / max(level, 1e-12)
