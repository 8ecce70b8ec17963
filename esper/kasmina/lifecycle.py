"""The stages of a seed, the gates between them, and the weight α that each stage gives it.

``dormant → germinated → training → blending → holding → fossilized``; any active seed can be
``culled``, after which its site is ``embargoed`` and then ``dormant`` again. In mode ``direct`` a
germinated seed (zero output, so the function is unchanged) holds at full strength at once. The gates
are in :mod:`esper.kasmina.gates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, get_args

from esper.errors import CheckpointError, ConfigError, LifecycleError
from esper.kasmina.gates import (
    PRESERVED_TOLERANCE,
    BlendSchedule,
    Facts,
    LifecycleConfig,
    Mode,
    Transition,
    next_transition,
)
from esper.messages import STAGES, Stage

__all__ = [
    "PRESERVED_TOLERANCE",
    "BlendSchedule",
    "Facts",
    "Lifecycle",
    "LifecycleConfig",
    "Mode",
    "Transition",
    "blend_alpha",
    "legal_targets",
    "next_transition",
    "stage_alpha",
]

_MIN_ALPHA = 1e-3
_SIGMOID_STEEPNESS = 12.0


_LEGAL: dict[Stage, tuple[Stage, ...]] = {
    "dormant": ("germinated",),
    "germinated": ("training", "culled"),
    "training": ("blending", "culled"),
    "blending": ("holding", "culled"),
    "holding": ("fossilized", "culled"),
    "fossilized": (),
    "culled": ("embargoed",),
    "embargoed": ("dormant",),
}


def legal_targets(stage: Stage, mode: Mode) -> tuple[Stage, ...]:
    """The stages that may follow ``stage``."""
    if stage == "germinated" and mode == "direct":
        return ("holding", "culled")
    return _LEGAL[stage]


def blend_alpha(schedule: BlendSchedule, t: float) -> float:
    """Weight of a blending seed.

    Args:
        schedule: ``linear`` t; ``cosine`` (1 − cos πt)/2; ``sigmoid``, a logistic curve scaled to end at 1.
        t: Fraction of the blend including the coming step; clamped to [0, 1].

    Returns:
        α, non-decreasing in t, exactly 1 at t = 1 and never 0: α = 0 would give the seed no gradient.
    """
    t = min(max(t, 0.0), 1.0)
    if t == 1.0:
        return 1.0
    if schedule == "linear":
        alpha = t
    elif schedule == "cosine":
        alpha = (1.0 - math.cos(math.pi * t)) / 2.0
    elif schedule == "sigmoid":
        low = _logistic(-_SIGMOID_STEEPNESS / 2.0)
        alpha = (_logistic(_SIGMOID_STEEPNESS * (t - 0.5)) - low) / (1.0 - 2.0 * low)
    else:
        raise ConfigError(
            f"blend schedule must be one of {', '.join(get_args(BlendSchedule))}, got {schedule!r}"
        )
    return min(max(alpha, _MIN_ALPHA), 1.0)


def stage_alpha(stage: Stage, stage_age_steps: int, config: LifecycleConfig) -> float:
    """Weight α for the coming step of a seed that has been in ``stage`` for ``stage_age_steps``."""
    if stage == "blending":
        return blend_alpha(config.blend_schedule, (stage_age_steps + 1) / config.blend_steps)
    return 1.0 if stage in ("holding", "fossilized") else 0.0


class Lifecycle:
    """The stage of one seed, and after a cull of its site, with the history of how it got there.

    Args:
        config: The thresholds of its gates.
        stage: Where it begins.
    """

    def __init__(self, config: LifecycleConfig, stage: Stage = "dormant") -> None:
        self.config = config
        self.stage: Stage = stage
        self.history: list[Transition] = []

    def __repr__(self) -> str:
        return f"Lifecycle({self.stage}, {len(self.history)} transitions)"

    def propose(self, facts: Facts) -> Transition | None:
        """What the gate of the current stage says; see :func:`next_transition`."""
        return next_transition(self.stage, facts, self.config)

    def apply(self, transition: Transition, step: int) -> Transition:
        """Make a move and note it in the history.

        Args:
            transition: As :meth:`propose` gave it, or made by hand.
            step: Optimizer steps taken so far.

        Returns:
            The transition as noted.

        Raises:
            LifecycleError: It does not start here, or leads where the lifecycle does not. Nothing changes.
        """
        legal = legal_targets(self.stage, self.config.mode)
        if transition.source != self.stage or transition.target not in legal:
            allowed = " or ".join(legal) or "nothing"
            raise LifecycleError(
                f"cannot go from {transition.source} to {transition.target}: the seed is {self.stage}, from "
                f"where mode {self.config.mode!r} allows {allowed}"
            )
        noted = replace(transition, step=step)
        self.history.append(noted)
        self.stage = noted.target
        return noted

    def move(self, target: Stage, reason: str, step: int, **measurements: float) -> Transition:
        """Make a move decided elsewhere, by a policy, the governor or a user.

        Raises:
            LifecycleError: It is not legal from the current stage. Nothing changes.
        """
        return self.apply(Transition(self.stage, target, reason, measurements), step)

    def state_dict(self) -> dict[str, Any]:
        """Stage and history as plain types."""
        return {"stage": self.stage, "history": [asdict(transition) for transition in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned.

        Raises:
            CheckpointError: It names no stage, or its history does not end in it. Nothing changes.
        """
        try:
            history = [Transition(**entry) for entry in state["history"]]
            stage = state["stage"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"lifecycle state cannot be read ({error!r}); the checkpoint is damaged"
            ) from error
        if stage not in STAGES or (history and history[-1].target != stage):
            raise CheckpointError(
                f"lifecycle state names stage {stage!r}, which is unknown or not where its history ends; "
                "the checkpoint is damaged"
            )
        self.stage, self.history = stage, history


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
