"""``random``: a random blueprint at a random site, on the same schedule and budget as every other policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig, check_options

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["RandomConfig", "RandomPolicy"]


@dataclass(frozen=True)
class RandomConfig(EventConfig):
    """Options.

    Attributes:
        blueprints: Blueprints to draw from; empty for all that fit.
    """

    blueprints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        text = isinstance(self.blueprints, str)
        check_options(self, (not text, "blueprints should be a list of names, not one string"))
        object.__setattr__(self, "blueprints", tuple(self.blueprints))  # lists come from files


class RandomPolicy(EventPolicy[RandomConfig]):
    """The control that a claim about *where* to grow has to beat.

    A site is drawn uniformly from those available, then a blueprint uniformly from those that fit there;
    what the budget cannot pay is put back and drawn anew.
    """

    name: str = "random"
    config_type: ClassVar[type[RandomConfig]] = RandomConfig

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Draw with ``state.generator`` until something fits."""
        wanted = self.config.blueprints
        urn = {
            view.site.name: [name for name in view.site.blueprints if not wanted or name in wanted]
            for view in state.sites
            if not view.unavailable
        }
        urn = {site: blueprints for site, blueprints in urn.items() if blueprints}
        if not urn:
            return Pause("no site is available")
        numbers = {"num_sites": len(urn), "num_pairs": sum(map(len, urn.values()))}
        while urn:
            site = _draw(sorted(urn), state.generator)
            blueprint = _draw(urn[site], state.generator)
            size = self.fit(state, [(site, blueprint)])
            if size:
                reason = f"drawn at random from {numbers['num_sites']} sites"
                return [Choice(site, blueprint, size, reason, numbers=numbers)]
            urn[site].remove(blueprint)
            if not urn[site]:
                del urn[site]
        return self.too_small(state, "any seed at any site")


def _draw(items: Sequence[str], generator: torch.Generator) -> str:
    return items[int(torch.randint(len(items), (), generator=generator, device=generator.device))]
