"""What all growing policies share: the schedule of events, the answers, the numbers written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from esper.messages import Decision
from esper.tamiyo.policies.events import EventConfig, EventSchedule
from esper.tamiyo.policies.shape import WIDENING, units
from esper.tamiyo.policies.sizes import Place, Room, largest_size

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["Choice", "EventPolicy", "Pause", "wait"]


@dataclass(frozen=True)
class Choice:
    """One seed to germinate, and why."""

    site: str
    blueprint: str
    size: int
    reason: str
    confidence: float = 1.0
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """No growth at this decision point, and why; ``spends`` the event when looking again is not worth it."""

    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    spends: bool = False


def wait(policy: str, reason: str, numbers: Mapping[str, float] | None = None) -> Decision:
    """A WAIT decision with its reason."""
    return Decision(action="wait", reason=reason, policy=policy, numbers=_finite(numbers or {}))


ConfigT = TypeVar("ConfigT", bound=EventConfig)


class EventPolicy(Generic[ConfigT]):
    """A policy that may grow when an event of its schedule is due; :meth:`choose` says what.

    Args:
        config: Options.
    """

    name: str

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.events = EventSchedule(config)

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Answer a due event; germinations and parameters are left when this is called."""
        raise NotImplementedError

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer a decision point with germinations, or one WAIT."""
        before = self._numbers(state)
        closed = self._closed(state)
        answer = Pause(closed) if closed else self.choose(state)
        if isinstance(answer, Pause):
            if answer.spends:
                self.events.use()
            return [wait(self.name, answer.reason, {**before, **answer.numbers})]
        assert 0 < len(answer) <= state.germinations_left
        self.events.use()
        return [self._germinate(state, choice, before) for choice in answer]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"events": self.events.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self.events.load_state_dict(state["events"])

    def share(self, state: GrowthState) -> Room:
        """What the event at hand may spend: an equal part for each event that remains."""
        return Room.left(state).part(self.events.remaining)

    def fit(self, state: GrowthState, places: Sequence[Place], *, whole: bool = False) -> int:
        """Largest size for seeds at ``places`` within this event's share; 0 when none fits.

        Args:
            state: Prices and budgets.
            places: Where, and what.
            whole: May spend everything that is left, not this event's share alone.
        """
        left = Room.left(state)
        room = left if whole else self.share(state)
        found = largest_size(state, places, room, least=self.least(state, places), reserve=left)
        return 0 if found is None else found.size

    def least(self, state: GrowthState, places: Sequence[Place]) -> int:
        """Smallest size worth having: ``min_size`` units, or as many as a narrower layer has."""
        sources = {view.site.name: view.site.source for view in state.sites}
        sizes = [1]
        for site, blueprint in places:
            if blueprint in WIDENING:
                layer = state.topology.layer(sources[site])
                sizes.append(min(self.config.min_size, units(layer.output_shape, layer.image)))
        return max(sizes)

    def too_small(self, state: GrowthState, what: str) -> Pause:
        """The answer when nothing fits the budget."""
        left = f"{state.parameters_left} parameters and {state.flops_left:.3g} training FLOPs are left"
        return Pause(f"{what} does not fit the budget: {left}")

    def _closed(self, state: GrowthState) -> str:
        """Why nothing may grow at this decision point; empty when an event is due and may grow."""
        if self.config.num_events == 0:
            return "no growth event is planned"
        if self.events.remaining == 0:
            return f"all {self.config.num_events} growth events have been used"
        if not self.events.due(state.step, state.total_steps):
            return (
                f"growth event {self.events.used + 1} of {self.config.num_events} falls at step "
                f"{math.ceil(self.events.moment() * state.total_steps - 1e-6 * state.total_steps)}"
            )
        if not state.window_open:
            return "the growth window is closed"
        if state.germinations_left < 1:
            return "this epoch has had all its germinations"
        if state.parameters_left < 1:
            return "the parameter budget is used up"
        return "" if state.flops_left > 0 else "the FLOPs budget is used up"

    def _numbers(self, state: GrowthState) -> dict[str, float]:
        return {
            "fraction": state.fraction,
            "events_used": self.events.used,
            "num_events": self.config.num_events,
            "parameters_left": state.parameters_left,
            "flops_left": state.flops_left,
            "train_loss": state.train_loss,
        }

    def _germinate(self, state: GrowthState, choice: Choice, before: Mapping[str, float]) -> Decision:
        cost = state.cost(choice.site, choice.blueprint, choice.size)
        numbers = {**before, "parameters": cost.parameters, "forward_flops": cost.flops, **choice.numbers}
        return Decision(
            action="germinate",
            reason=choice.reason,
            policy=self.name,
            site=choice.site,
            blueprint=choice.blueprint,
            size=choice.size,
            confidence=min(1.0, max(0.0, choice.confidence)),
            risk=min(1.0, cost.parameters / max(1, state.host_parameters)),
            numbers=_finite(numbers),
        )


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Leave out what JSON has no number for: an unlimited budget, a loss that was not measured."""
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
