"""``narrowest``: widens the narrowest hidden layer, whatever else is known about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig
from esper.tamiyo.policies.shape import hidden_layers

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["NarrowestPolicy"]


class NarrowestPolicy(EventPolicy[EventConfig]):
    """Top-1 right in .75 of states, .50 on hosts of random widths (GROWTH.md §1)."""

    name: str = "narrowest"
    config_type: ClassVar[type[EventConfig]] = EventConfig

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Take the narrowest layer that is available and affordable; the first of equals."""
        layers = [layer for layer in hidden_layers(state) if not layer.view.unavailable]
        if not layers:
            return Pause("no hidden layer can be widened now")
        for layer in sorted(layers, key=lambda layer: layer.width):
            site = layer.view.site.name
            size = self.fit(state, [(site, layer.blueprint)])
            if size:
                reason = (
                    f"{layer.name} has {layer.width} units, the fewest of those free and within the budget"
                )
                numbers = {f"width:{other.name}": float(other.width) for other in layers}
                return [Choice(site, layer.blueprint, size, reason, numbers=numbers)]
        return self.too_small(state, "widening any layer")
