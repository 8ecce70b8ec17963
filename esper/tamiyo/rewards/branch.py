"""What a reward is computed from: the measured course of a run after a decision, and of its control."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

from esper.errors import ConfigError
from esper.messages import Count, NonNegative
from esper.tamiyo.graph.facts import Candidate

__all__ = ["Branch", "Outcome", "kind_of"]


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation of a run from a decision: with the adaptation, or without it.

    The first point is the decision itself, measured before anything was changed. Costs count from there and
    hold everything: scoring, measurements, seeds that were culled later.

    Attributes:
        steps: Optimizer steps at which the loss was measured, ascending.
        losses: Mean loss there, in nats; NaN or inf where it was.
        training_flops: Training FLOPs spent since the decision.
        seconds: Wall time since the decision; empty where it was not measured.
        num_parameters: At the last point.
        rollbacks: Of the governor.
        culls: Seeds that this adaptation planted and that were culled.
        non_finite: Times that a NaN or an inf was met in loss, gradients or a seed's output.
    """

    steps: tuple[Count, ...]
    losses: tuple[float, ...]
    training_flops: tuple[NonNegative, ...]
    num_parameters: Count
    seconds: tuple[NonNegative, ...] = ()
    rollbacks: Count = 0
    culls: Count = 0
    non_finite: Count = 0

    def __post_init__(self) -> None:
        lengths = {"losses": len(self.losses), "training_flops": len(self.training_flops)}
        if self.seconds:
            lengths["seconds"] = len(self.seconds)
        wrong = [f"{n} {name}" for name, n in lengths.items() if n != len(self.steps)]
        if not self.steps or wrong:
            raise ConfigError(
                f"Branch: expected one loss and one cost for each of {len(self.steps)} steps (at least one), got "
                f"{', '.join(wrong) or 'no step'}"
            )
        for name in ("steps", "training_flops", "seconds"):
            values: Sequence[float] = getattr(self, name)
            strictly = name == "steps"
            if any(b < a or (strictly and b == a) for a, b in itertools.pairwise(values)):
                raise ConfigError(f"Branch: {name} should ascend, got {list(values)}")

    @property
    def last_loss(self) -> float:
        """The loss at the last point; inf where it was NaN, because no loss is worse."""
        return math.inf if math.isnan(self.losses[-1]) else self.losses[-1]

    def until(self, step: int) -> Branch:
        """The part up to ``step``; the decision itself always belongs to it."""
        n = max(1, sum(s <= step for s in self.steps))
        return msgspec.structs.replace(
            self, steps=self.steps[:n], losses=self.losses[:n], training_flops=self.training_flops[:n],
            seconds=self.seconds[:n],
        )  # fmt: skip


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A decision and what came of it.

    Attributes:
        candidate: What was done.
        total_steps: Length of the run.
        price: λ of the run, in nats per unit of log(parameters / the control's).
        taken: The run as it went on.
        control: The same run, the same data in the same order, without the adaptation; a fitted one where
            ``control_stderr`` is given; None where there is neither.
        control_stderr: Standard error in nats of each loss of a fitted control; empty for a real one.
        held_out: The losses are of data that were not trained on.
        adaptations_after: Other adaptations that were carried out before the last point.
        control_noise: Standard deviation in nats of a fitted control's losses about their curve; 0 for a real one.
    """

    candidate: Candidate
    total_steps: Count
    taken: Branch
    price: NonNegative = 0.0
    control: Branch | None = None
    control_stderr: tuple[NonNegative, ...] = ()
    held_out: bool = True
    adaptations_after: Count = 0
    control_noise: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.control is not None and self.control.steps[0] != self.taken.steps[0]:
            raise ConfigError(
                f"Outcome: the control should start at the decision, step {self.taken.steps[0]}, got a control "
                f"from step {self.control.steps[0]}"
            )
        expected = 0 if self.control is None else len(self.control.steps)
        if self.control_stderr and len(self.control_stderr) != expected:
            raise ConfigError(
                f"Outcome: expected one standard error for each of the control's {expected} losses, got "
                f"{len(self.control_stderr)}"
            )

    @property
    def is_wait(self) -> bool:
        """Nothing was done, so the run is its own control."""
        return self.candidate.action == "wait"

    @property
    def provenance(self) -> str:
        """Where the comparison comes from: ``itself``, ``control``, ``fitted ± se`` or ``none``."""
        if self.is_wait:
            return "itself"
        if self.control is None:
            return "none"
        if not self.control_stderr:
            return "control"
        return f"fitted ± {self.control_stderr[-1]:.3g}"


def kind_of(candidate: Candidate) -> str:
    """What counts as the same kind of adaptation: the action, with site kind and blueprint of its seeds.

    Names of sites and sizes are left out, else every layer would be a new kind to be rewarded for.
    """
    parts = sorted({f"{p.kind}/{p.blueprint}" for p in candidate.placements if p.kind or p.blueprint})
    return ":".join([candidate.action, *parts])
