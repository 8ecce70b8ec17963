"""``off``: never grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from esper.messages import Decision
from esper.tamiyo.policies.base import wait

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["OffConfig", "OffPolicy"]


@dataclass(frozen=True)
class OffConfig:
    """No options."""


class OffPolicy:
    """Always waits; health is watched all the same."""

    name: str = "off"
    config_type: ClassVar[type[OffConfig]] = OffConfig

    def __init__(self, config: OffConfig) -> None:
        self.config = config

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer with WAIT."""
        return [wait(self.name, "policy off")]

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take on."""
