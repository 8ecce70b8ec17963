"""How an episode is asked, and what it may spend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.errors import ConfigError
from esper.tamiyo.config import TamiyoConfig, build_config
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.graph.candidates import CandidateConfig

__all__ = ["BUDGETS", "PRICES", "EpisodeConfig"]

PRICES = (0.0, 0.03, 0.1, 0.3)
"""λ that episodes are sampled with: utility lost per unit of log(parameters / host parameters)."""

BUDGETS = (1.25, 1.5, 2.0, 3.0)
"""Largest ratios of parameters to the host's that episodes are sampled with."""

_AFTER_SHIFT = 0.04


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of one episode.

    Attributes:
        price: λ of the episode.
        budget: Parameters of host and seeds over the host's, at most.
        fractions: Shares of the run at which it is asked; a run whose data shift is asked after each shift too.
        decision_interval: Share of the run between two looks: a sampled step of health signals, and a loss in
            the history.
        candidates: What is offered.
        follow: Measure the held-out loss at every look, charged to nobody, for the outcome's ``course``.
    """

    price: float = 0.0
    budget: float = 2.0
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    decision_interval: float = 0.05
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    follow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        wrong = [
            message
            for holds, message in (
                (self.price >= 0.0, "price should not be negative"),
                (self.budget >= 1.0, "budget should be at least 1"),
                (list(self.fractions) == sorted(set(self.fractions)), "fractions should ascend"),
                (all(0.0 < f < 1.0 for f in self.fractions), "every fraction should lie in (0, 1)"),
                (0.0 < self.decision_interval <= 0.5, "decision_interval should lie in (0, 0.5]"),
            )
            if not holds
        ]
        if wrong:
            raise ConfigError(f"EpisodeConfig: {'; '.join(wrong)}; got {self}")

    def with_settings(self, **settings: Any) -> EpisodeConfig:
        """The same with some fields changed.

        Raises:
            ConfigError: A field is unknown or out of range.
        """
        known = [f.name for f in dataclasses.fields(self)]
        if unknown := sorted(set(settings) - set(known)):
            raise ConfigError(f"an episode has no setting {', '.join(unknown)}; it has {', '.join(known)}")
        return dataclasses.replace(self, **settings) if settings else self

    def moments(self, spec: HostSpec) -> list[int]:
        """Steps from which on the run is asked, ascending."""
        shifts = () if spec.shift is None else spec.shift.at
        after = [step + round(_AFTER_SHIFT * spec.total_steps) for step in shifts]
        planned = [round(fraction * spec.total_steps) for fraction in self.fractions]
        return sorted({step for step in (*planned, *after) if step < spec.total_steps})

    def tamiyo_config(self, spec: HostSpec) -> TamiyoConfig:
        """The run's settings: the package's own, but for ages and intervals, which follow its short length."""

        def share(fraction: float, least: int = 1) -> int:
            return max(least, round(fraction * spec.total_steps))

        return build_config(
            policy="schedule",
            policy_options={"num_events": 0},
            window=(0.0, 1.0),  # when to grow is for whoever is asked to decide
            seed=spec.seed % 2**31,
            budget={
                "max_parameters_ratio": self.budget,
                "max_seeds_alive": 16,
                "max_germinations_per_epoch": 16,
                "site_cooldown_steps": share(0.05),
            },
            probes={"decision_interval": self.decision_interval},
            lifecycle={
                "min_holding_steps": share(0.06),
                "max_holding_steps": share(0.5, 2),
                "gate_interval_steps": share(0.02),
                "embargo_steps": share(0.2),
                "judged": "together",
            },
            bus=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpisodeConfig:
        """Undo :meth:`to_dict`.

        Raises:
            ConfigError: A field is unknown or out of range.
        """
        rest = dict(values)
        try:
            offered = CandidateConfig(**rest.pop("candidates", {}))
        except TypeError as error:
            raise ConfigError(f"candidates of an episode: {error}") from error
        return cls().with_settings(candidates=offered, **rest)
