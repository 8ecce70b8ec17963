"""How one arm's run of one match ended."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from esper.messages import Count, NonNegative
from esper.tamiyo.environment.specs import Shape
from esper.tamiyo.judging.matches import Group

__all__ = ["LEAST_UTILITY", "MOST_UTILITY", "VIEWS", "Trial", "View", "utility"]

View = Literal["flops", "steps"]
VIEWS: tuple[View, ...] = ("flops", "steps")
"""Every arm spends as many training FLOPs as the ungrown host would; or takes as many steps as it would."""

LEAST_UTILITY, MOST_UTILITY = -3.0, 3.0
"""Nats. A run that failed or diverged counts as the worst of these, and is counted apart as well."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; losses and accuracies are None where the run failed.

    Attributes:
        arm: Who trained.
        view: What is equal among arms.
        group: Of the host.
        family: Of the host.
        host: Its name.
        shape: How its widths were drawn.
        repeat: Of the host.
        price: λ.
        budget: Parameters over the host's, at most.
        planned_steps: Of the ungrown host.
        total_steps: Of this run.
        flops_ratio: Training FLOPs over those of the ungrown host's whole run.
        test_loss: Nats, on the test part, which steers nothing.
        test_accuracy: Share right, or share of variance explained.
        held_out_loss: Nats, on the part that gates and policies look at.
        host_parameters: Of the ungrown host.
        num_parameters: At the end.
        seconds: Of the processor, decisions included.
        germinated: Seeds.
        culled: Seeds that were removed again.
        recycled: Layers.
        rollbacks: By the governor.
        asked: Decision points at which a learned policy judged candidates.
        waited: Those of them at which nothing was done.
        fell_back: Those of them that its gate left to the fallback.
        error: Why the run failed; empty where it did not.
    """

    arm: str
    view: View
    group: Group
    family: str
    host: str
    shape: Shape
    repeat: Count
    price: NonNegative
    budget: float
    planned_steps: Count
    total_steps: Count = 0
    flops_ratio: NonNegative = 0.0
    test_loss: float | None = None
    test_accuracy: float | None = None
    held_out_loss: float | None = None
    host_parameters: Count = 0
    num_parameters: Count = 0
    seconds: NonNegative = 0.0
    germinated: Count = 0
    culled: Count = 0
    recycled: Count = 0
    rollbacks: Count = 0
    asked: Count = 0
    waited: Count = 0
    fell_back: Count = 0
    error: str = ""

    @property
    def match(self) -> str:
        """Tells apart what is paired: host and repeat."""
        return f"{self.host}#{self.repeat}"

    @property
    def failed(self) -> bool:
        """Whether it raised an error or did not end with a finite loss."""
        return bool(self.error) or self.test_loss is None

    @property
    def idle(self) -> bool:
        """Whether nothing was grown or recycled, nor was there from the start."""
        grown = self.num_parameters != self.host_parameters
        return not (grown or self.germinated or self.recycled)


def utility(trial: Trial, none: Trial, *, price: float | None = None) -> float:
    """U = (loss_none − loss) − λ·log(P / P_host), on the test part, within bounds.

    A failed run has the worst utility; where the ungrown host failed as well, that of a tie.

    Args:
        trial: Of an arm.
        none: Of the ungrown host in the same match and view.
        price: λ; the match's own if None.
    """
    if trial.failed:
        return 0.0 if none.failed else LEAST_UTILITY
    if none.failed:
        return MOST_UTILITY
    assert trial.test_loss is not None
    assert none.test_loss is not None
    grown = math.log(trial.num_parameters / trial.host_parameters)
    gained = none.test_loss - trial.test_loss
    value = gained - (trial.price if price is None else price) * grown
    return min(max(value, LEAST_UTILITY), MOST_UTILITY)
