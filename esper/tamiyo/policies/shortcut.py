"""``shortcut``: a long bypass from the host's input to its output, once and early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.events import EventConfig, check_options
from esper.tamiyo.policies.shape import long_bypasses

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["ShortcutConfig", "ShortcutPolicy"]


@dataclass(frozen=True)
class ShortcutConfig(EventConfig):
    """Options: with more than one event, bypasses from early layers follow the one from the input.

    Attributes:
        blueprint: What is laid along the bypass.
    """

    num_events: int = 1
    blueprint: str = "shortcut"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, (bool(self.blueprint), "blueprint should be the name of a blueprint"))


class ShortcutPolicy(EventPolicy[ShortcutConfig]):
    """The strongest single action measured on MLPs, level with the oracle (GROWTH.md §6)."""

    name: str = "shortcut"
    config_type: ClassVar[type[ShortcutConfig]] = ShortcutConfig

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Take the first long bypass that no seed lies along, those from the host's input first."""
        bypasses = [b for b in long_bypasses(state, [self.config.blueprint]) if not b.used]
        free = [bypass for bypass in bypasses if not bypass.view.unavailable]
        if not free:
            why = "; ".join(f"{b.view.site.name} is {b.view.unavailable}" for b in bypasses)
            return Pause(why or "the host has no long bypass that is not used")
        for bypass in free:
            site = bypass.view.site
            size = self.fit(state, [(site.name, bypass.blueprint)])
            if size:
                start = "the host's input" if bypass.from_input else f"the input of {site.source}"
                reason = f"a way around the hidden layers, from {start} to {site.target}"
                return [Choice(site.name, bypass.blueprint, size, reason)]
        return self.too_small(state, "any long bypass")
