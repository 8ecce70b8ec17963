"""``cond``: widens the narrowest layer if it is far narrower than the median one, else waits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig, check_options
from esper.tamiyo.policies.shape import hidden_layers

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["CondConfig", "CondPolicy"]


@dataclass(frozen=True)
class CondConfig(EventConfig):
    """Options.

    Attributes:
        ratio: The narrowest hidden layer is widened while it is below this share of the median width.
    """

    ratio: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, (0.0 < self.ratio <= 1.0, "ratio should lie in (0, 1]"))


class CondPolicy(EventPolicy[CondConfig]):
    """The two-line rule of GROWTH.md §6: +.31 loss on digits, +.15 on Fashion-MNIST, over waiting."""

    name: str = "cond"
    config_type: ClassVar[type[CondConfig]] = CondConfig

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Compare the narrowest hidden layer with the median of all, grown units included."""
        layers = hidden_layers(state)
        if not layers:
            return Pause("no hidden layer can be widened here")
        narrowest = min(layers, key=lambda layer: layer.width)
        median = statistics.median(layer.width for layer in layers)
        numbers = {f"width:{layer.name}": float(layer.width) for layer in layers}
        numbers |= {"median_width": float(median), "ratio": narrowest.width / median}
        facts = f"{narrowest.name} has {narrowest.width} units, the median layer {median:g}"
        if narrowest.width >= self.config.ratio * median:
            return Pause(f"the host is shaped well enough: {facts}", numbers)
        site = narrowest.view.site.name
        if narrowest.view.unavailable:
            return Pause(f"{facts}, but {site} is {narrowest.view.unavailable}", numbers)
        size = self.fit(state, [(site, narrowest.blueprint)])
        if not size:
            return self.too_small(state, f"widening {narrowest.name}")
        return [Choice(site, narrowest.blueprint, size, f"{facts}: it is widened", numbers=numbers)]
