"""Find how many steps an arm may take for the training FLOPs of the ungrown host's whole run.

What an arm spends beyond the host's steps is known only once it has run: seeds planted and culled, statistics,
measurements, look-ahead. So it runs with the host's schedule first, and then again with a schedule that is
compressed by what it spent too much, until it is within tolerance. Everything in a run happens at shares of
it, so a compressed run spends in proportion, unless the policy decides otherwise in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["LEAST_STEPS", "TOLERANCE", "fit_steps"]

TOLERANCE = 0.01
"""Share of the planned FLOPs by which a run may miss them."""

LEAST_STEPS = 20
"""A schedule is not compressed further; the ratio that is reported tells."""

_TRIES = 4

_Run = TypeVar("_Run")


def fit_steps(
    run: Callable[[int], _Run],
    ratio: Callable[[_Run], float],
    first: _Run,
    steps: int,
    *,
    tolerance: float = TOLERANCE,
) -> tuple[int, _Run]:
    """Return the number of steps and the run whose FLOPs come closest to the plan.

    Args:
        run: Trains over so many steps.
        ratio: FLOPs of a run over the planned ones.
        first: The run over ``steps``.
        steps: That the host takes; never more.
        tolerance: Where to stop.
    """
    runs = {steps: first}
    least = min(LEAST_STEPS, steps)
    at = steps
    for _ in range(_TRIES):
        # a step more or less is the least that can be changed
        if abs(ratio(runs[at]) - 1.0) <= max(tolerance, 0.5 / at):
            return at, runs[at]
        at = max(least, min(steps, _next(at, {taken: ratio(run) for taken, run in runs.items()})))
        if at in runs:
            break
        runs[at] = run(at)
    best = min(runs, key=lambda taken: abs(ratio(runs[taken]) - 1.0))
    return best, runs[best]


def _next(at: int, ratios: Mapping[int, float]) -> int:
    """Where a line through the last two runs meets the plan; with one run, the line through zero."""
    in_proportion = round(at / ratios[at])
    if len(ratios) < 2:
        return in_proportion
    before = list(ratios)[-2]
    slope = (ratios[at] - ratios[before]) / (at - before)
    # a policy that decided otherwise in one of them makes a line that means nothing
    return round(at + (1.0 - ratios[at]) / slope) if slope > 0.1 * ratios[at] / at else in_proportion
