"""What is learned from, where to, and how much work it may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from esper.errors import ConfigError
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.learning.config import check
from esper.tamiyo.oracle.trials import TRIED

__all__ = ["Effort", "LearnConfig", "Stage"]

Stage = Literal["supervised", "ppo"]


@dataclass(frozen=True)
class Effort:
    """How much work each part is. It is counted, not timed, so that a seed gives one result on any machine.

    Attributes:
        hidden_sizes: Widths of networks; the best on the validation hosts is taken.
        num_seeds: Networks of each width; those of one width are averaged for the student to learn from.
        max_epochs: Of each fit.
        batch_size: Decisions a step of each fit.
        max_trees: Of the boosted baseline.
        fresh_states: Decision points of further training hosts that the student sees beside the table's. Nothing
            is tried there, so a point is cheap; the teachers say what its candidates are worth.
        urgency_states: Training states at which waiting one interval is tried.
        transfer: Fit once without each family, to set thresholds by what happens on unknown families.
        curve_points: Sizes of the learning curve, the whole table the last of them.
        ppo_rounds: Updates of PPO.
        ppo_episodes: Episodes for each.
        judged_episodes: Episodes on validation hosts, and as many on test hosts, that PPO is judged by.
    """

    hidden_sizes: tuple[int, ...] = (64, 96)
    num_seeds: int = 5
    max_epochs: int = 40
    batch_size: int = 32
    max_trees: int = 400
    fresh_states: int = 400
    urgency_states: int = 60
    transfer: bool = True
    curve_points: int = 5
    ppo_rounds: int = 30
    ppo_episodes: int = 24
    judged_episodes: int = 40

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        least_one = (
            "num_seeds",
            "max_epochs",
            "batch_size",
            "max_trees",
            "curve_points",
            "ppo_rounds",
            "judged_episodes",
        )
        check(
            self,
            (bool(self.hidden_sizes), "hidden_sizes should not be empty"),
            (len(set(self.hidden_sizes)) == len(self.hidden_sizes), "hidden_sizes should differ"),
            (all(h >= 4 and h % 4 == 0 for h in self.hidden_sizes), "hidden sizes should be multiples of 4"),
            *((getattr(self, name) >= 1, f"{name} should be at least 1") for name in least_one),
            (self.ppo_episodes >= 2, "ppo_episodes should be at least 2"),
            (self.fresh_states >= 0, "fresh_states should not be negative"),
            (self.urgency_states >= 0, "urgency_states should not be negative"),
        )

    @classmethod
    def for_minutes(cls, minutes: float) -> Effort:
        """What takes about so long on two cores, by what was measured (experiments/policy/README.md).

        Raises:
            ConfigError: Less than one minute.
        """
        if not minutes >= 1.0:
            raise ConfigError(f"expected at least one minute to learn in, got {minutes}")
        most = cls()
        share = min(1.0, minutes / 50.0)
        if share == 1.0:
            return most

        def part(name: str, least: int) -> int:
            return max(least, round(share * getattr(most, name)))

        return cls(
            hidden_sizes=most.hidden_sizes if minutes >= 30 else most.hidden_sizes[:1],
            num_seeds=part("num_seeds", 1) if minutes >= 30 else (3 if minutes >= 8 else 1),
            max_epochs=max(10, min(40, round(4 * minutes))),
            fresh_states=part("fresh_states", 0),
            urgency_states=part("urgency_states", 0),
            transfer=minutes >= 8,
            curve_points=4 if minutes >= 8 else 2,
            ppo_rounds=part("ppo_rounds", 1),
            judged_episodes=max(8, min(40, round(2 * minutes))),
        )


@dataclass(frozen=True)
class LearnConfig:
    """One learning.

    Attributes:
        table: Folder of the oracle table.
        out: Folder of everything that comes of it; what is finished there is not done again.
        seed: Of everything that is drawn.
        stages: In which order they are listed does not matter: ``ppo`` goes on from ``supervised``.
        num_workers: Processes of one thread each; 0 works in this one. Has no influence on results.
        rollout: Where whole runs are played: on this machine, or on a Ray cluster (extra ``ray``).
        prices: λ at which every state is looked at.
        known_share: Share of validation states that count as known (:class:`~esper.tamiyo.network.novelty.Novelty`).
        candidates: What was offered when the table was made.
        effort: How much work.
    """

    table: Path = Path("experiments/oracle/table")
    out: Path = Path("runs/learn_policy")
    seed: int = 0
    stages: tuple[Stage, ...] = ("supervised", "ppo")
    num_workers: int = 2
    rollout: Literal["local", "ray"] = "local"
    prices: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    known_share: float = 0.95
    candidates: CandidateConfig = TRIED
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        for name in ("stages", "prices"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        known = get_args(Stage)
        check(
            self,
            (self.seed >= 0, "seed should not be negative"),
            (self.num_workers >= 0, "num_workers should not be negative"),
            (
                "supervised" in self.stages and set(self.stages) <= set(known),
                f"stages should be supervised, or supervised and ppo, of {', '.join(known)}",
            ),
            (bool(self.prices) and min(self.prices) >= 0, "prices should be some, none of them negative"),
            (0 < self.known_share < 1, "known_share should lie in (0, 1)"),
        )

    def decides(self) -> dict[str, Any]:
        """Everything that finished parts depend on beside the table: neither where they run, nor what comes after."""
        values = dataclasses.asdict(self)
        for name in ("table", "out", "num_workers", "rollout", "stages"):
            del values[name]
        return values


def with_settings(effort: Effort, settings: Mapping[str, Any]) -> Effort:
    """The same with some fields changed.

    Raises:
        ConfigError: A field is unknown or out of range.
    """
    known = [f.name for f in dataclasses.fields(effort)]
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"learning a policy has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return dataclasses.replace(effort, **settings)
