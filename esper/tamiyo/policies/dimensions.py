"""``dimensions``: adds units where (d_in + 1) x d_out is largest, without looking at data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig
from esper.tamiyo.policies.shape import hidden_layers

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["DimensionsPolicy"]


class DimensionsPolicy(EventPolicy[EventConfig]):
    """The no-data rule of GROWTH.md §5: 88.6 against 88.35-88.5 for a shape search by score.

    d_in counts the weights of one unit (a patch, for a convolution), d_out the units of the layer that it
    feeds, each with what has been grown there. It is also where an untested score finds its noise.
    """

    name: str = "dimensions"
    config_type: ClassVar[type[EventConfig]] = EventConfig

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Take the layer of largest product that is available and affordable; the first of equals."""
        layers = [layer for layer in hidden_layers(state) if not layer.view.unavailable]
        if not layers:
            return Pause("no hidden layer can be widened now")
        numbers = {f"product:{layer.name}": float(layer.fan_in * layer.fan_out) for layer in layers}
        for layer in sorted(layers, key=lambda layer: -layer.fan_in * layer.fan_out):
            site = layer.view.site.name
            size = self.fit(state, [(site, layer.blueprint)])
            if size:
                product = f"{layer.fan_in} x {layer.fan_out}"
                reason = (
                    f"{layer.name} has the largest dimensions, {product}, of those free and within the budget"
                )
                return [Choice(site, layer.blueprint, size, reason, numbers=numbers)]
        return self.too_small(state, "widening any layer")
