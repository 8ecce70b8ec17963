"""When growth events fall: the one schedule that every policy follows, so that arms can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.errors import ConfigError

__all__ = ["EventConfig", "EventSchedule", "check_options"]


def check_options(owner: object, *conditions: tuple[bool, str]) -> None:
    """Raise a :class:`~esper.errors.ConfigError` that lists every condition that does not hold."""
    wrong = [message for holds, message in conditions if not holds]
    if wrong:
        raise ConfigError(f"{type(owner).__name__}: {'; '.join(wrong)}; got {owner}")


@dataclass(frozen=True)
class EventConfig:
    """Options that all growing policies share.

    Growth pays within the first 10-30 % of a run, 1 to 20 events make no difference, and fewer than 16
    units at once are too few (GROWTH.md §5).

    Attributes:
        num_events: Growth events; 0 for none at all. Each may spend an equal part of what is left.
        start: Share of the run at which the first event falls.
        end: Share of the run over which events are spread; the last falls one spacing before it.
        min_size: Hidden units that a widening adds at least; a layer with fewer is at least doubled.
    """

    num_events: int = 2
    start: float = 0.05
    end: float = 0.3
    min_size: int = 16

    def __post_init__(self) -> None:
        check_options(
            self,
            (self.num_events >= 0, "num_events should not be negative"),
            (0.0 <= self.start <= self.end <= 1.0, "start and end should be shares, 0 <= start <= end <= 1"),
            (self.min_size >= 1, "min_size should be at least 1"),
        )


class EventSchedule:
    """Counts the events of one run.

    Decision points need not fall on events: an event is due from its moment until it is used, and events
    that have piled up take one decision point each.

    Args:
        config: How many events, and when.
    """

    def __init__(self, config: EventConfig) -> None:
        self.config = config
        self.used = 0

    @property
    def remaining(self) -> int:
        """Events that have not been used."""
        return max(0, self.config.num_events - self.used)

    def moment(self) -> float:
        """Share of the run at which the next event falls; inf when there is none."""
        if self.remaining == 0:
            return float("inf")
        config = self.config
        return config.start + self.used * (config.end - config.start) / config.num_events

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the next event's moment has come at ``step`` of ``total_steps``."""
        # Rounding must not put an event one decision point later than its exact share.
        return step + 1e-6 * total_steps >= self.moment() * total_steps

    def use(self) -> None:
        """Count one event as used."""
        assert self.remaining > 0
        self.used += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self.used = int(state["used"])
