"""How large a seed may be: the largest size whose cost fits what a budget leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from esper.errors import GrowthError
from esper.kasmina.blueprints.registry import Cost

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["Fit", "Place", "Room", "largest_size"]

MAX_SIZE = 1 << 20
"""Where the search for a size ends; far beyond any layer."""


@dataclass(frozen=True)
class Room:
    """What may still be spent.

    Attributes:
        parameters: Parameters that may be added.
        training_flops: Training FLOPs that may be added over the rest of the run.
        samples: Samples that the rest of the run still trains on.
    """

    parameters: int
    training_flops: float
    samples: float

    @classmethod
    def left(cls, state: GrowthState) -> Room:
        """All that the budgets of ``state`` leave."""
        positions = state.tokens_per_parameter * state.host_parameters * max(0.0, 1.0 - state.fraction)
        samples = positions / max(1, state.topology.positions)
        return cls(max(0, state.parameters_left), max(0.0, state.flops_left), samples)

    def part(self, parts: int) -> Room:
        """One of ``parts`` equal parts."""
        return Room(self.parameters // max(1, parts), self.training_flops / max(1, parts), self.samples)

    def holds(self, cost: Cost) -> bool:
        """Whether a seed of this cost fits; a training step costs three times its forward pass."""
        affordable = 3.0 * cost.flops * self.samples <= self.training_flops
        return affordable and cost.parameters <= self.parameters

    def after(self, cost: Cost) -> Room:
        """What is left once ``cost`` has been paid."""
        spent = 3.0 * cost.flops * self.samples
        return Room(self.parameters - cost.parameters, self.training_flops - spent, self.samples)


class Fit(NamedTuple):
    """A size that fits, as the blueprint understands it, and the cost of all seeds of that size."""

    size: int
    cost: Cost


Place = tuple[str, str]
"""Name of a site, and of a blueprint that fits there."""


def largest_size(
    state: GrowthState, places: Sequence[Place], room: Room, *, least: int = 1, reserve: Room | None = None
) -> Fit | None:
    """Find the largest size that seeds at all ``places`` can have at once within ``room``, by bisection.

    Where a larger size costs nothing more (a full-rank shortcut), or a blueprint refuses it (a stack of
    one block), the smallest size that has it all is the answer.

    Args:
        state: Prices.
        places: Where, and what; all get the same size.
        room: What the seeds may cost together.
        least: Smallest size worth having, unless the blueprint itself ends below it.
        reserve: May be drawn on to reach ``least``; nothing beyond it.

    Returns:
        The size and the total cost, or None when not even ``least`` fits.
    """
    costs: dict[int, Cost | None] = {}

    def price(size: int) -> Cost | None:
        if size not in costs:
            try:
                each = [state.cost(site, blueprint, size) for site, blueprint in places]
                costs[size] = Cost(sum(c.parameters for c in each), sum(c.flops for c in each))
            except GrowthError:  # a blueprint's way to say that its sizes end before this one
                costs[size] = None
        return costs[size]

    def fits(size: int) -> bool:
        cost = price(size)
        return cost is not None and room.holds(cost)

    found, ends = _search(fits, price)
    if found < least and not ends:
        cost = price(least)
        found = least if reserve is not None and cost is not None and reserve.holds(cost) else 0
    best = price(found) if found else None
    return None if best is None else Fit(found, best)


def _search(fits: Callable[[int], bool], price: Callable[[int], Cost | None]) -> tuple[int, bool]:
    """The largest size that fits (0: none), and whether the blueprint, not the budget, ends there."""
    low, high = 0, 1
    while fits(high) and high < MAX_SIZE:
        if low and price(low) == price(high):  # nothing more to buy: find where that began
            return 1 + _bisect(partial(_cheaper, price, price(high)), low // 2, low), True
        low, high = high, 2 * high
    found = _bisect(fits, low, high)
    return found, found > 0 and price(found + 1) is None


def _cheaper(price: Callable[[int], Cost | None], most: Cost | None, size: int) -> bool:
    return price(size) != most


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Largest size in [low, high) for which ``holds``, given that it holds at ``low`` and not at ``high``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
