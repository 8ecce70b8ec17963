"""Sizes and prices of candidates, at three prices a place and run.

A price is counted by building a branch without memory and running it, which takes 1-3 ms; a decision point
asks for the sizes of dozens of seeds. Nearly all blueprints cost an affine function of their size, so two
prices give the line, one at the size found checks it, and everything below is read off it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.errors import GrowthError
from esper.kasmina.blueprints.registry import Cost
from esper.tamiyo.policies.sizes import MAX_SIZE, Fit, Place, Room, largest_size

if TYPE_CHECKING:
    from esper.kasmina.topology import ModelTopology
    from esper.tamiyo.state import GrowthState

__all__ = ["PriceCurves"]


@dataclass
class _Curve:
    """What is known of the price of one blueprint at one place.

    Attributes:
        one: Price at size 1.
        step: What each further size adds.
        checked: Largest size at which the line was found to hold.
        most: The size from which on nothing more can be bought, and its price; None while not known.
    """

    one: Cost
    step: Cost
    checked: int = 2
    most: Fit | None = None

    def at(self, size: int) -> Cost:
        """Price on the line."""
        return Cost(
            self.one.parameters + (size - 1) * self.step.parameters,
            self.one.flops + (size - 1) * self.step.flops,
        )


class PriceCurves:
    """Remembers how prices rise with size, for one host; another host's state starts it afresh."""

    def __init__(self) -> None:
        self._curves: dict[Place, _Curve | None] = {}
        self._topology: ModelTopology | None = None

    def largest(
        self, state: GrowthState, places: Sequence[Place], room: Room, *, most: int = MAX_SIZE
    ) -> Fit | None:
        """The largest size up to ``most`` that seeds at all ``places`` can have within ``room``, and their cost.

        Gives what :func:`~esper.tamiyo.policies.sizes.largest_size` gives, which is asked where a price is
        no line.

        Returns:
            None when not even size 1 fits.
        """
        if state.topology is not self._topology:
            self._curves, self._topology = {}, state.topology
        found = [self._curve(state, place) for place in places]
        curves = [curve for curve in found if curve is not None]
        if not places or len(curves) < len(found):
            return None
        ends = [curve.most for curve in curves if curve.most is not None]
        if len(ends) == len(curves) == 1:
            if room.holds(ends[0].cost):
                return ends[0]
            if ends[0].size == 1:
                return None
        line = _Curve(_total(c.one for c in curves), _total(c.step for c in curves))
        if not room.holds(line.one):
            return None
        size = _along(line, room, most)
        if all(self._holds(state, *pair, size) for pair in zip(places, curves, strict=True)):
            return Fit(size, line.at(size))
        exact = largest_size(state, places, room)
        if exact is not None and exact.size > most:
            return Fit(most, _total(state.cost(*place, most) for place in places))
        if exact is not None and len(curves) == 1:
            more = self._priced(state, places[0], exact.size + 1)
            curves[0].most = exact if more is None or more == exact.cost else None
        return exact

    def ends_below(self, state: GrowthState, place: Place, size: int) -> bool:
        """Whether the blueprint has nothing more to buy from some size below ``size`` on, as far as is known."""
        curve = self._curve(state, place)
        return curve is not None and curve.most is not None and curve.most.size < size

    def _curve(self, state: GrowthState, place: Place) -> _Curve | None:
        if place not in self._curves:
            one, two = (self._priced(state, place, size) for size in (1, 2))
            if one is None:
                self._curves[place] = None
            elif two is None or two == one:
                self._curves[place] = _Curve(one, Cost(0, 0), 1, Fit(1, one))
            else:
                step = Cost(two.parameters - one.parameters, two.flops - one.flops)
                self._curves[place] = _Curve(one, step)
        return self._curves[place]

    def _holds(self, state: GrowthState, place: Place, curve: _Curve, size: int) -> bool:
        """Whether the line holds at ``size``; prices it when that is further out than it was checked."""
        if size > curve.checked:
            if self._priced(state, place, size) != curve.at(size):
                return False
            curve.checked = size
        return curve.most is None or size < curve.most.size

    def _priced(self, state: GrowthState, place: Place, size: int) -> Cost | None:
        try:
            return state.cost(*place, size)
        except GrowthError:  # a blueprint's way to say that its sizes end before this one
            return None


def _total(costs: Iterable[Cost]) -> Cost:
    parameters = flops = 0
    for cost in costs:
        parameters, flops = parameters + cost.parameters, flops + cost.flops
    return Cost(parameters, flops)


def _along(line: _Curve, room: Room, most: int) -> int:
    """The largest size up to ``most`` on ``line`` that ``room`` holds, size 1 being held."""
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room.holds(line.at(middle)) else (low, middle)
    return low
