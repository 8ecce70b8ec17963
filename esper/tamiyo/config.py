"""Settings of a growing run, parsed and checked once at the entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from esper.errors import ConfigError
from esper.kasmina.lifecycle import LifecycleConfig
from esper.oona.config import BusConfig
from esper.tamiyo.governor import GovernorConfig
from esper.tamiyo.rewards.config import RewardConfig

__all__ = ["BudgetConfig", "ProbeConfig", "TamiyoConfig", "build_config"]

DEFAULT_POLICY = "expressivity"


@dataclass(frozen=True)
class BudgetConfig:
    """How much may grow.

    Attributes:
        max_parameters_ratio: Trained parameters of host and seeds over the ungrown host's. Frozen ones do not
            count, unless all of the host is frozen.
        max_flops_ratio: Training FLOPs that seeds and scoring may add over the whole run, over those
            of the ungrown host; inf for no limit.
        max_seeds_alive: Seeds that may be on their way at once; fossilised ones do not count.
        max_germinations_per_epoch: Germinations an epoch.
        site_cooldown_steps: Optimizer steps between two germinations at one site.
        max_scoring_fraction: Share of the training FLOPs so far, and of one decision interval's to
            come, that scoring sites may cost.
    """

    max_parameters_ratio: float = 2.0
    max_flops_ratio: float = float("inf")
    max_seeds_alive: int = 8
    max_germinations_per_epoch: int = 8
    site_cooldown_steps: int = 50
    max_scoring_fraction: float = 0.03

    def __post_init__(self) -> None:
        _check(
            self,
            (self.max_parameters_ratio >= 1, "max_parameters_ratio should be at least 1"),
            (self.max_flops_ratio >= 0, "max_flops_ratio should not be negative"),
            (self.max_seeds_alive >= 1, "max_seeds_alive should be at least 1"),
            (self.max_germinations_per_epoch >= 1, "max_germinations_per_epoch should be at least 1"),
            (self.site_cooldown_steps >= 0, "site_cooldown_steps should not be negative"),
            (0 < self.max_scoring_fraction <= 1, "max_scoring_fraction should lie in (0, 1]"),
        )


@dataclass(frozen=True)
class ProbeConfig:
    """What is measured when.

    Attributes:
        interval_steps: Optimizer steps between sampled steps; 0 turns probes off.
        decision_interval: Share of the run between two decision points.
        held_out_batches: Validation batches used by gates and scores.
        max_samples: Cap on rows when a site is scored.
        log_health: Send each layer's health to the trainer's loggers on sampled steps.
    """

    interval_steps: int = 200
    decision_interval: float = 0.02
    held_out_batches: int = 4
    max_samples: int = 1024
    log_health: bool = True

    def __post_init__(self) -> None:
        _check(
            self,
            (self.interval_steps >= 0, "interval_steps should not be negative"),
            (0 < self.decision_interval <= 1, "decision_interval should lie in (0, 1]"),
            (self.held_out_batches >= 1, "held_out_batches should be at least 1"),
            (self.max_samples >= 2, "max_samples should be at least 2"),
        )


@dataclass(frozen=True)
class TamiyoConfig:
    """All settings of :class:`esper.TamiyoCallback`.

    Attributes:
        policy: Registered policy name; ``off`` only watches.
        policy_options: Keyword arguments of the policy.
        window: Growth window as shares of the run: outside it a policy may recycle, not grow.
        horizon_steps: Length of the run in optimizer steps where the trainer cannot tell it.
        finish: ``keep`` the grown network, or ``retrain`` its shape from fresh weights once the window
            is over and no seed is on its way.
        seed: Base of all random numbers that growth draws.
        widen_start: Fan-in of new hidden units: ``random`` (He), or ``closed_form`` (the directions that the
            loss gradient misses, GROWTH.md §2); their fan-out is zero either way.
        birth_lr_multiplier: Factor on the updates of parameters that are not fossilised yet.
        seed_lr_multiplier: Factor on the updates of all parameters of seeds, for good. Adapters want a lower
            rate than the fresh head that they are trained with (experiments/finetune).
        sharded: ``refuse`` a model whose parameters FSDP2 shards, or grow it all the same: ``experimental``, with
            what esper/docs/sharding.md lists.
        journal: Where ``growth.jsonl`` goes; None for the trainer's log folder.
        experience: Path of the store (SQLite) that keeps every decision with what came of it, for runs to learn
            from; several runs may share one. The held-out loss is then measured at every decision point, and
            charged: a pass over the held-out batches each time, which a run of a few hundred steps feels.
            None keeps nothing.
        budget: Limits.
        probes: Measurements.
        lifecycle: Stages and gates.
        governor: Protection against divergence.
        rewards: What a stored decision is taken to have earned.
        bus: Message bus; None turns it off.
    """

    policy: str = DEFAULT_POLICY
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    window: tuple[float, float] = (0.05, 0.3)
    horizon_steps: int | None = None
    finish: Literal["keep", "retrain"] = "keep"
    seed: int = 0
    widen_start: Literal["random", "closed_form"] = "random"
    birth_lr_multiplier: float = 1.0
    seed_lr_multiplier: float = 1.0
    sharded: Literal["refuse", "experimental"] = "refuse"
    journal: str | None = None
    experience: str | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    bus: BusConfig | None = field(default_factory=BusConfig)

    def __post_init__(self) -> None:
        window = tuple(self.window)
        _check(
            self,
            (
                len(window) == 2 and 0 <= window[0] < window[1] <= 1,
                "window should be two shares, 0 <= from < to <= 1",
            ),
            (self.horizon_steps is None or self.horizon_steps >= 1, "horizon_steps should be at least 1"),
            (self.finish in ("keep", "retrain"), "finish should be 'keep' or 'retrain'"),
            (
                self.widen_start in ("random", "closed_form"),
                "widen_start should be 'random' or 'closed_form'",
            ),
            (
                self.sharded in ("refuse", "experimental"),
                "sharded should be 'refuse' or 'experimental'",
            ),
            (self.birth_lr_multiplier > 0, "birth_lr_multiplier should be positive"),
            (self.seed_lr_multiplier > 0, "seed_lr_multiplier should be positive"),
        )


_SECTIONS = {
    "budget": BudgetConfig,
    "probes": ProbeConfig,
    "lifecycle": LifecycleConfig,
    "governor": GovernorConfig,
    "rewards": RewardConfig,
    "bus": BusConfig,
}


def build_config(base: TamiyoConfig | None = None, **settings: Any) -> TamiyoConfig:
    """Make a config from keyword arguments; sections may be dataclasses or plain mappings.

    Args:
        base: Taken as it is where ``settings`` says nothing.
        **settings: Fields of :class:`TamiyoConfig`.

    Raises:
        ConfigError: An unknown name or a value out of range.
    """
    base = base or TamiyoConfig()
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        _known(TamiyoConfig, name, "TamiyoCallback")
        if name in _SECTIONS and isinstance(value, Mapping):
            for key in value:
                _known(_SECTIONS[name], str(key), f"section {name!r}")
            current = getattr(base, name)
            section = _SECTIONS[name]() if current is None else current
            value = dataclasses.replace(section, **value)
        elif name in _SECTIONS and value is not None and not isinstance(value, _SECTIONS[name]):
            raise ConfigError(
                f"{name} should be a {_SECTIONS[name].__name__} or a mapping of its fields, "
                f"got {type(value).__name__}"
            )
        changes[name] = tuple(value) if name == "window" else value
    return dataclasses.replace(base, **changes)


def _known(cls: type, name: str, where: str) -> None:
    fields = [f.name for f in dataclasses.fields(cls)]
    if name not in fields:
        raise ConfigError(f"unknown setting {name!r} in {where}; it has {', '.join(fields)}")


def _check(owner: object, *conditions: tuple[bool, str]) -> None:
    wrong = [message for holds, message in conditions if not holds]
    if wrong:
        raise ConfigError(f"{type(owner).__name__}: {'; '.join(wrong)}; got {owner}")
