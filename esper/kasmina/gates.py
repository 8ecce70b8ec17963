"""The gates of the lifecycle: thresholds, measured facts, and the comparison of the two.

Everything here is pure: facts are measured elsewhere and a gate only compares them with its
thresholds. A contribution is *measured with the seed off and on, host as adapted*: the host may
have come to rely on the seed, so a positive contribution does not prove that the run is better for
having grown it (GROWTH.md §3.5). Only a control run without the seed tells that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from esper.errors import ConfigError
from esper.messages import Stage

__all__ = [
    "PRESERVED_TOLERANCE",
    "BlendSchedule",
    "Facts",
    "LifecycleConfig",
    "Mode",
    "Transition",
    "next_transition",
]

Mode = Literal["direct", "isolated"]
BlendSchedule = Literal["linear", "cosine", "sigmoid"]
Judged = Literal["alone", "together"]

PRESERVED_TOLERANCE = 1e-6
"""Largest change of any output that germination may cause, in float32."""


@dataclass(frozen=True, kw_only=True)
class LifecycleConfig:
    """Thresholds of the gates. Ages are in optimizer steps.

    Attributes:
        mode: ``direct`` (full strength from birth) or ``isolated`` (trained unseen, then blended in).
        min_training_steps: An isolated seed trains at least this long.
        max_training_steps: A seed that has not passed its gate by then is culled.
        min_gradient_snr: Norm of the mean gradient over its standard error that an isolated seed must
            show; where it was not measured, a finite and non-zero gradient norm does.
        max_output_ratio: Largest norm of the contribution relative to the host's output at which a seed
            may start to blend.
        blend_steps: Steps from the first positive α to α = 1.
        blend_schedule: ``linear``, ``cosine`` or ``sigmoid``.
        min_holding_steps: A seed holds at least this long.
        max_holding_steps: A seed that has not passed its gate by then is culled.
        min_contribution: Held-out loss with the seed off minus on, as a fraction of the loss with it on.
        contribution_stderrs: How many standard errors above zero the mean contribution must lie.
        num_measurements: The last so many measured contributions count; fewer are not enough.
        max_spread: Largest standard deviation of those, relative to the size of their mean.
        embargo_steps: How long the site of a culled seed stays empty.
        gate_interval_steps: Gates are looked at every so many steps.
        judged: Whose contribution is measured: each seed's ``alone``, or that of all seeds born at one step
            ``together``, which then fossilise or go together. Many small seeds each contribute less than can
            be measured, and cost two held-out passes each.
    """

    mode: Mode = "direct"
    min_training_steps: int = 50
    max_training_steps: int = 400
    min_gradient_snr: float = 1.0
    max_output_ratio: float = 1.0
    blend_steps: int = 100
    blend_schedule: BlendSchedule = "linear"
    min_holding_steps: int = 50
    max_holding_steps: int = 500
    min_contribution: float = 0.001
    contribution_stderrs: float = 1.0
    num_measurements: int = 3
    max_spread: float = 1.0
    embargo_steps: int = 200
    gate_interval_steps: int = 10
    judged: Judged = "alone"

    def __post_init__(self) -> None:
        mistakes = [
            f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            for name, allowed in (
                ("mode", get_args(Mode)),
                ("blend_schedule", get_args(BlendSchedule)),
                ("judged", get_args(Judged)),
            )
            if getattr(self, name) not in allowed
        ]
        for name, least in _LEAST_COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                mistakes.append(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in _NON_NEGATIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                mistakes.append(f"{name} must be a finite number of at least 0, got {value!r}")
        for stage in ("training", "holding"):
            low, high = getattr(self, f"min_{stage}_steps"), getattr(self, f"max_{stage}_steps")
            if isinstance(low, int) and isinstance(high, int) and low > high:
                mistakes.append(f"min_{stage}_steps ({low}) must not exceed max_{stage}_steps ({high})")
        if mistakes:
            raise ConfigError("lifecycle: " + "; ".join(mistakes))

    def gate_due(self, step: int) -> bool:
        """Whether gates are to be looked at after optimizer step ``step``."""
        return step % self.gate_interval_steps == 0


_LEAST_COUNTS = {
    "min_training_steps": 0,
    "max_training_steps": 1,
    "blend_steps": 1,
    "min_holding_steps": 0,
    "max_holding_steps": 1,
    "num_measurements": 2,  # one has neither a spread nor a standard error
    "embargo_steps": 0,
    "gate_interval_steps": 1,
}
_NON_NEGATIVE = (
    "min_gradient_snr",
    "max_output_ratio",
    "min_contribution",
    "contribution_stderrs",
    "max_spread",
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a seed when its gate is looked at; None is *not measured*.

    Attributes:
        age_steps: Optimizer steps since germination.
        stage_age_steps: Optimizer steps since the current stage was entered.
        gradient_norm: Norm of the seed's parameter gradients.
        gradient_snr: Norm of their mean over its standard error.
        contributions: Held-out loss with the seed off minus on, one a measurement, oldest first.
        held_out_loss: Loss with the seed on at the last of them.
        output_ratio: Norm of the contribution over the norm of the host's output.
        non_finite: Forward passes or gradients with a NaN or an inf since germination.
        alpha: Current weight.
        preserved_error: Largest change of any output caused by germination.
        registered: Each of its parameters is in exactly one optimizer group.
        num_judged: Seeds whose contribution was measured as one; see ``LifecycleConfig.judged``.
    """

    age_steps: int
    stage_age_steps: int
    gradient_norm: float | None = None
    gradient_snr: float | None = None
    contributions: Sequence[float] = ()
    held_out_loss: float | None = None
    output_ratio: float | None = None
    non_finite: int = 0
    alpha: float = 0.0
    preserved_error: float | None = None
    registered: bool = False
    num_judged: int = 1


@dataclass(frozen=True)
class Transition:
    """One move from stage to stage, with its reason as a sentence and the numbers behind it."""

    source: Stage
    target: Stage
    reason: str
    measurements: dict[str, float] = field(default_factory=dict)
    step: int = 0


def next_transition(stage: Stage, facts: Facts, config: LifecycleConfig) -> Transition | None:
    """Look at the gate of ``stage``.

    Args:
        stage: Where the seed (or, after a cull, its site) is.
        facts: What was measured.
        config: The thresholds.

    Returns:
        The move to make with its reason, or None to stay. ``dormant`` is left by a decision and
        ``fossilized`` never, so both give None.
    """
    age = facts.stage_age_steps
    if stage == "culled":
        reason = f"the site rests for {config.embargo_steps} steps after a cull"
        return Transition(stage, "embargoed", reason, {"embargo_steps": float(config.embargo_steps)})
    if stage == "embargoed":
        if age < config.embargo_steps:
            return None
        reason = f"the site has rested for {age} of {config.embargo_steps} steps"
        return Transition(stage, "dormant", reason, {"stage_age_steps": float(age)})
    if stage in ("dormant", "fossilized"):
        return None
    if facts.non_finite > 0:
        reason = f"its values were not finite {_times(facts.non_finite)}"
        return Transition(stage, "culled", reason, {"non_finite": float(facts.non_finite), **_ages(facts)})
    gate = {"germinated": _germinated, "training": _training, "blending": _blending, "holding": _holding}[
        stage
    ]
    return gate(facts, config)


def _germinated(facts: Facts, config: LifecycleConfig) -> Transition | None:
    error = facts.preserved_error
    measured = {**_ages(facts), **_known(preserved_error=error), "registered": float(facts.registered)}
    if error is not None and not error <= PRESERVED_TOLERANCE:
        reason = f"germination changed an output by {error:.3g}, more than {PRESERVED_TOLERANCE:.0e}"
        return Transition("germinated", "culled", reason, measured)
    unmet = []
    if error is None:
        unmet.append("whether outputs are preserved was not measured")
    if not facts.registered:
        unmet.append("not every parameter is in exactly one optimizer group")
    if unmet:
        return _late("germinated", unmet, facts, config.max_training_steps, measured)
    reason = f"outputs changed by {error:.3g} at most and its parameters are in the optimizer"
    return Transition("germinated", "holding" if config.mode == "direct" else "training", reason, measured)


def _training(facts: Facts, config: LifecycleConfig) -> Transition | None:
    norm, snr, ratio = facts.gradient_norm, facts.gradient_snr, facts.output_ratio
    measured = {**_ages(facts), **_known(gradient_norm=norm, gradient_snr=snr, output_ratio=ratio)}
    if facts.stage_age_steps < config.min_training_steps:
        return None
    unmet = []
    if norm is None or not 0 < norm < math.inf:
        unmet.append("its gradient was not measured" if norm is None else f"its gradient norm is {norm:.3g}")
    if snr is not None and not snr >= config.min_gradient_snr:
        unmet.append(
            f"its gradient's signal-to-noise ratio of {snr:.3g} is under {config.min_gradient_snr:.3g}"
        )
    if ratio is None or not 0 < ratio <= config.max_output_ratio:
        unmet.append(
            "its output was not measured"
            if ratio is None
            else f"its output is {ratio:.3g} of the host's, not in (0, {config.max_output_ratio:.3g}]"
        )
    if unmet:
        return _late("training", unmet, facts, config.max_training_steps, measured)
    signal = "" if snr is None else f", signal-to-noise {snr:.3g}"
    reason = (
        f"after {facts.stage_age_steps} steps its gradient norm is {norm:.3g}{signal} "
        f"and its output {ratio:.3g} of the host's"
    )
    return Transition("training", "blending", reason, measured)


def _blending(facts: Facts, config: LifecycleConfig) -> Transition | None:
    if facts.stage_age_steps < config.blend_steps or facts.alpha < 1.0:
        return None
    reason = f"it reached full strength after {facts.stage_age_steps} steps"
    return Transition("blending", "holding", reason, {**_ages(facts), "alpha": facts.alpha})


def _holding(facts: Facts, config: LifecycleConfig) -> Transition | None:
    if facts.stage_age_steps < config.min_holding_steps:
        return None
    recent = list(facts.contributions)[-config.num_measurements :]
    measured = {
        **_ages(facts),
        "num_measurements": float(len(recent)),
        "num_judged": float(facts.num_judged),
    }
    if len(recent) < config.num_measurements or facts.held_out_loss is None:
        unmet = [f"only {len(recent)} of {config.num_measurements} held-out measurements were made"]
        return _late("holding", unmet, facts, config.max_holding_steps, measured)
    mean, deviation = _mean_and_deviation(recent)
    stderr = deviation / math.sqrt(len(recent))
    fraction = _ratio(mean, abs(facts.held_out_loss))
    spread = _ratio(deviation, abs(mean))
    measured |= {
        "contribution": mean,
        "contribution_stderr": stderr,
        "contribution_fraction": fraction,
        "spread": spread,
        "held_out_loss": facts.held_out_loss,
    }
    unmet = []
    if not fraction >= config.min_contribution:
        unmet.append(f"its contribution of {fraction:.3%} of the loss is under {config.min_contribution:.3%}")
    if not mean > config.contribution_stderrs * stderr:
        unmet.append(
            f"its contribution of {mean:.3g} does not clear {config.contribution_stderrs:.3g} standard "
            f"errors of {stderr:.3g}"
        )
    if not spread <= config.max_spread:
        unmet.append(
            f"its contribution varies by {spread:.3g} of its mean, more than {config.max_spread:.3g}"
        )
    if unmet:
        return _late("holding", unmet, facts, config.max_holding_steps, measured)
    off = "it" if facts.num_judged == 1 else f"the {facts.num_judged} seeds of its birth"
    reason = (
        f"with {off} off the held-out loss is {mean:.3g} ± {stderr:.2g} higher "
        f"({fraction:.2%}, host as adapted), steady within {spread:.2g}"
    )
    return Transition("holding", "fossilized", reason, measured)


def _late(
    stage: Stage, unmet: list[str], facts: Facts, limit: int, measured: dict[str, float]
) -> Transition | None:
    """Cull a seed whose time for a gate is over; until then it stays."""
    if facts.stage_age_steps < limit:
        return None
    reason = f"after {facts.stage_age_steps} steps ({limit} allowed) {'; '.join(unmet)}"
    return Transition(stage, "culled", reason, measured)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN, where ``statistics`` would raise, for values not finite."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - 1))


def _ratio(a: float, b: float) -> float:
    """a / b for b ≥ 0, with a signed infinity for a division by zero and 0 for 0 / 0."""
    if b != 0:
        return a / b
    return math.copysign(math.inf, a) if a else 0.0


def _ages(facts: Facts) -> dict[str, float]:
    return {"age_steps": float(facts.age_steps), "stage_age_steps": float(facts.stage_age_steps)}


def _known(**measurements: float | None) -> dict[str, float]:
    return {name: value for name, value in measurements.items() if value is not None}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
