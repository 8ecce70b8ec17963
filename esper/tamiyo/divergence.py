"""Tell an exploding run from a bad batch.

A loss is compared with the median of recent good ones, by a factor and in robust standard
deviations (median absolute deviation × 1.4826), because one bad batch must not end an experiment
and a mean would follow the explosion. Exploding values enter the statistics only once a good one
follows them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.errors import CheckpointError, ConfigError

__all__ = ["DivergenceDetector", "GovernorConfig", "Verdict"]

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True)
class GovernorConfig:
    """When a run counts as diverging, and how far the governor goes.

    Attributes:
        check_interval_steps: Optimizer steps between checks.
        idle_gradient_checks: While nothing can be undone, so many checks are judged at once, the last of them by the
            gradients too; each is at its own step while there is a snapshot or a seed that is not fossilised.
        window: Good checks that a new one is compared with.
        min_checks: Good checks before anything but a NaN or an inf can be bad.
        loss_factor: A loss this many times the recent median is exploding, if also
        deviations: this many robust standard deviations above it, and
        min_increase: above it by this share of the run's first median loss; without that, noise would
            look like an explosion once the loss is near zero.
        gradient_factor: The same for the gradient norm, which has heavier tails.
        patience: Checks in a row that must explode; a NaN or an inf counts at once.
        watch_steps: How long after an adaptation its snapshot is kept.
        max_rollbacks: Rollbacks in a run; with the last one growth stops.
        embargo_steps: How long the site of a rolled-back adaptation stays empty.
    """

    check_interval_steps: int = 10
    idle_gradient_checks: int = 5
    window: int = 32
    min_checks: int = 5
    loss_factor: float = 4.0
    deviations: float = 8.0
    min_increase: float = 0.1
    gradient_factor: float = 100.0
    patience: int = 3
    watch_steps: int = 500
    max_rollbacks: int = 3
    embargo_steps: int = 1000

    def __post_init__(self) -> None:
        mistakes = []
        for name, least in _LEAST_COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                mistakes.append(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, low in _LEAST_NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < math.inf:
                mistakes.append(f"{name} must be a finite number of at least {low:g}, got {value!r}")
        if not mistakes and self.min_checks > self.window:
            mistakes.append(f"min_checks ({self.min_checks}) must not exceed window ({self.window})")
        if mistakes:
            raise ConfigError("governor: " + "; ".join(mistakes))

    def check_due(self, step: int) -> bool:
        """Whether a check is due after optimizer step ``step``."""
        return step % self.check_interval_steps == 0


_LEAST_COUNTS = {
    "check_interval_steps": 1,
    "idle_gradient_checks": 1,
    "window": 3,
    "min_checks": 1,
    "patience": 1,
    "watch_steps": 1,
    "max_rollbacks": 0,
    "embargo_steps": 0,
}
_LEAST_NUMBERS = {"loss_factor": 1.0, "deviations": 0.0, "min_increase": 0.0, "gradient_factor": 1.0}


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check: ``suspect`` explodes, but not yet for long enough."""

    kind: Literal["ok", "suspect", "diverged"]
    reason: str = ""
    measurements: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all that was measured is finite."""
        return all(math.isfinite(value) for value in self.measurements.values())


class DivergenceDetector:
    """Keeps robust statistics of one run's losses and gradient norms.

    Args:
        config: See :class:`GovernorConfig`.
    """

    def __init__(self, config: GovernorConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._gradient_norms: deque[float] = deque(maxlen=config.window)
        self._first_loss: float | None = None
        self._suspects: list[tuple[float, float | None]] = []

    def check(self, loss: float, gradient_norm: float | None = None) -> Verdict:
        """Judge one sampled step.

        Args:
            loss: Training loss, of one batch or a mean since the last check.
            gradient_norm: Of the host's unscaled gradients; None when it was not measured, or where a
                gradient scaler deals with infinities by itself.
        """
        measured = {"loss": loss} | ({} if gradient_norm is None else {"gradient_norm": gradient_norm})
        if not all(math.isfinite(value) for value in measured.values()):
            bad = " and ".join(
                f"{name.replace('_', ' ')} is {v}" for name, v in measured.items() if not math.isfinite(v)
            )
            return Verdict("diverged", f"the {bad}", measured)
        reasons = []
        if self._explodes(
            loss, self._losses, self.config.loss_factor, self._least_increase(), measured, "loss"
        ):
            reasons.append(_describe("loss", loss, measured))
        if gradient_norm is not None and self._explodes(
            gradient_norm, self._gradient_norms, self.config.gradient_factor, 0.0, measured, "gradient_norm"
        ):
            reasons.append(_describe("gradient_norm", gradient_norm, measured))
        self._suspects.append((loss, gradient_norm))
        if reasons:
            strikes = len(self._suspects)
            kind: Literal["suspect", "diverged"] = (
                "diverged" if strikes >= self.config.patience else "suspect"
            )
            return Verdict(kind, f"{' and '.join(reasons)}, {strikes} checks in a row", measured)
        # What a good check follows was noise: leaving it out would make the spread look ever smaller.
        for past_loss, past_norm in self._suspects:
            self._losses.append(past_loss)
            if past_norm is not None:
                self._gradient_norms.append(past_norm)
        self._suspects.clear()
        if self._first_loss is None and len(self._losses) >= self.config.min_checks:
            self._first_loss = statistics.median(self._losses)
        return Verdict("ok", "", measured)

    def pardon(self, *, new_level: bool) -> None:
        """Start counting afresh after an intervention.

        Args:
            new_level: Forget the recent values too, so that the coming ones are the new normal.
        """
        self._suspects.clear()
        if new_level:
            self._losses.clear()
            self._gradient_norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next verdict depends on, as plain types."""
        return {
            "losses": list(self._losses),
            "gradient_norms": list(self._gradient_norms),
            "first_loss": self._first_loss,
            "suspects": [list(pair) for pair in self._suspects],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned.

        Raises:
            CheckpointError: A field is missing. Nothing was changed.
        """
        try:
            losses, norms = list(state["losses"]), list(state["gradient_norms"])
            first, suspects = state["first_loss"], [(pair[0], pair[1]) for pair in state["suspects"]]
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"the divergence detector's state cannot be read ({error!r}); the checkpoint is damaged"
            ) from error
        self._losses = deque(losses, maxlen=self.config.window)
        self._gradient_norms = deque(norms, maxlen=self.config.window)
        self._first_loss, self._suspects = first, suspects

    def _least_increase(self) -> float:
        return self.config.min_increase * abs(self._first_loss or 0.0)

    def _explodes(
        self,
        value: float,
        recent: deque[float],
        factor: float,
        least: float,
        measured: dict[str, float],
        name: str,
    ) -> bool:
        """Compare with recent good values, by the excess over the median: a loss may be negative."""
        if len(recent) < self.config.min_checks:
            return False
        median = statistics.median(recent)
        excess = value - median
        if excess <= max((factor - 1.0) * abs(median), least):
            return False  # nearly always, and the spread takes as long again
        sigma = _MAD_TO_SIGMA * statistics.median(abs(x - median) for x in recent)
        measured |= {f"{name}_median": median, f"{name}_sigma": sigma}
        return excess > self.config.deviations * sigma


def _describe(name: str, value: float, measured: Mapping[str, float]) -> str:
    median, sigma = measured[f"{name}_median"], measured[f"{name}_sigma"]
    far = f", {(value - median) / sigma:.3g} robust deviations above it" if sigma else ""
    return f"the {name.replace('_', ' ')} of {value:.4g} is far above its recent median of {median:.4g}{far}"
