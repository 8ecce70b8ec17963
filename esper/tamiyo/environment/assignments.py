"""Which runs are played: hosts of known families, with a price of parameters and a budget each."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from esper.errors import ConfigError
from esper.tamiyo.environment.config import BUDGETS, PRICES
from esper.tamiyo.environment.families import FAMILIES, KNOWN, sample_host
from esper.tamiyo.environment.game import Assignment
from esper.tamiyo.environment.shapes import choose, integer
from esper.tamiyo.environment.specs import Split, derived_seed

__all__ = ["AssignmentConfig", "draw_assignment", "numbered_assignments"]


@dataclass(frozen=True)
class AssignmentConfig:
    """What is drawn from, uniformly.

    Attributes:
        families: Of hosts; a sealed one has the split ``sealed`` alone, and is for judging.
        split: Of hosts.
        num_hosts: Numbers of hosts, from 0, in each family.
        prices: λ.
        budgets: Largest ratios of parameters to the host's.
        max_steps: Longer runs are cut to so many steps, for trying things out; None keeps their lengths.
    """

    families: tuple[str, ...] = tuple(KNOWN)
    split: Split = "train"
    num_hosts: int = 1000
    prices: tuple[float, ...] = PRICES
    budgets: tuple[float, ...] = BUDGETS
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("families", "prices", "budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ConfigError(f"AssignmentConfig.{name} should not be empty")
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise ConfigError(f"no host family {', '.join(unknown)}; families are {', '.join(FAMILIES)}")
        if self.num_hosts < 1:
            raise ConfigError(f"AssignmentConfig.num_hosts must be at least 1, got {self.num_hosts}")
        if self.max_steps is not None and self.max_steps < 20:
            raise ConfigError(f"AssignmentConfig.max_steps must be at least 20, got {self.max_steps}")
        for family in self.families:
            sample_host(
                family, self.split, 0
            )  # a sealed family must fail here, not in the middle of learning


def draw_assignment(random: Random, config: AssignmentConfig) -> Assignment:
    """Draw a run."""
    family = choose(random, config.families)
    spec = sample_host(family, config.split, integer(random, 0, config.num_hosts - 1))
    return Assignment(
        spec=spec if config.max_steps is None else spec.shortened(config.max_steps),
        price=choose(random, config.prices),
        budget=choose(random, config.budgets),
    )


def numbered_assignments(config: AssignmentConfig, seed: int, count: int) -> list[Assignment]:
    """The first ``count`` runs of a sequence that ``seed`` names; each depends on its place in it alone."""
    return [
        draw_assignment(Random(derived_seed("assignment", seed, number)), config) for number in range(count)
    ]
