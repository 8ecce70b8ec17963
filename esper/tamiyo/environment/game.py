"""An episode played for reward: each decision earns what it changes at the end of the run.

With V(s) the utility of a run that from state s on waits to its end, U = (L_control − L) − λ·log(P / P_host),
a decision that leads from s to s' earns V(s') − V(s): difference rewards against the control that waits from
here on (Wolpert and Tumer 2002). They add up to the utility of the whole run, WAIT earns exactly 0, and only what
acts costs a run to the end. The control is the host trained without growth; its V is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import msgspec

from esper.errors import ConfigError, GrowthError
from esper.messages import Count, NonNegative
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.plain import Outcome, train_plain
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.graph.facts import Candidate, DecisionPoint
from esper.tamiyo.rewards.branch import Branch
from esper.tamiyo.rewards.branch import Outcome as Measured
from esper.tamiyo.rewards.config import RewardConfig
from esper.tamiyo.rewards.reward import Reward, RewardComputer

__all__ = ["Assignment", "Game", "GameConfig", "Move", "control_run"]

LEAST_UTILITY, MOST_UTILITY = -3.0, 3.0
"""Bounds of a utility in nats, so that a run that diverged counts as very bad and not as infinitely so."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """Which run is played at which price λ and budget (parameters over the host's, at most)."""

    spec: HostSpec
    price: NonNegative = 0.0
    budget: float = 2.0
    repeat: Count = 0


@dataclass(frozen=True)
class GameConfig:
    """How an episode is rewarded.

    Attributes:
        objective: ``utility`` in nats, or ``components``: the total of :mod:`esper.tamiyo.rewards`.
        credit: ``branch`` rewards each decision for what it changes; ``end`` gives the sum to the last one, and
            costs no runs beside the episode's own.
        reward: Weights and scales of the components.
        episode: Decision points and candidates; price and budget come with each assignment.
    """

    objective: Literal["utility", "components"] = "utility"
    credit: Literal["branch", "end"] = "branch"
    reward: RewardConfig = field(default_factory=RewardConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)

    def __post_init__(self) -> None:
        if self.objective not in ("utility", "components"):
            raise ConfigError(f"objective must be 'utility' or 'components', got {self.objective!r}")
        if self.credit not in ("branch", "end"):
            raise ConfigError(f"credit must be 'branch' or 'end', got {self.credit!r}")


@dataclass(frozen=True)
class Move:
    """What one decision came to.

    Attributes:
        reward: Earned by it.
        over: No decision follows.
        risk: 1 when the run that followed culled a seed or was rolled back, and had not before; 0 when not; NaN
            for WAIT and where it was not measured.
    """

    reward: float
    over: bool
    risk: float = math.nan


class Game:
    """Plays one episode.

    Args:
        assignment: Which.
        config: How it is rewarded.

    Raises:
        ConfigError: The run has no decision point.
    """

    def __init__(self, assignment: Assignment, config: GameConfig | None = None) -> None:
        self.assignment = assignment
        self.config = config or GameConfig()
        self._episode = Episode(
            assignment.spec,
            self.config.episode,
            repeat=assignment.repeat,
            price=assignment.price,
            budget=assignment.budget,
            follow=True,
        )
        self.control = control_run(assignment.spec, assignment.repeat, self._episode.config.decision_interval)
        self._value = 0.0
        self._outcome: Outcome | None = None
        self._adaptations: list[tuple[int, Candidate]] = []
        self._over = False
        self.point: DecisionPoint | None = self._episode.advance()
        """The open decision point; None when the episode is over."""
        if self.point is None:
            raise ConfigError(
                f"{assignment.spec.name} has no decision point; give EpisodeConfig fractions below 1"
            )

    def play(self, candidate_index: int) -> Move:
        """Answer the open decision point, and train to the next one.

        Raises:
            GrowthError: The episode is over.
            ConfigError: There is no such candidate, or it may not be chosen.
        """
        if self.point is None:
            raise GrowthError(f"{self.assignment.spec.name}: the episode is over; start another one")
        candidates, step = self.point.candidates, self._episode.step
        self._episode.act(candidate_index)
        candidate = candidates[candidate_index]
        acted = candidate.action not in ("wait", "hold")
        if acted:
            self._adaptations.append((step, candidate))
        last = self._episode.done
        reward, risk = 0.0, math.nan
        measured = candidate.action != "wait" if self.config.credit == "branch" else last
        if measured:
            reward, risk = self._run_ahead()
        # When nothing more is asked, how the run ends is known already.
        self.point = None if last else self._episode.advance()
        assert last == (self.point is None)
        return Move(reward, last, risk if acted else math.nan)

    @property
    def outcome(self) -> Outcome:
        """How the run ended, or would end if it waited from here on."""
        return self._outcome or self.control

    @property
    def utility(self) -> float:
        """U of :attr:`outcome`, in nats, within bounds."""
        loss, control = (_worst(o.held_out_loss) for o in (self.outcome, self.control))
        gained = 0.0 if loss == control else control - loss
        grown = math.log(self.outcome.num_parameters / self.outcome.host_parameters)
        return min(max(gained - self.assignment.price * grown, LEAST_UTILITY), MOST_UTILITY)

    @property
    def components(self) -> Reward | None:
        """What the rewards say of the whole run, from its first adaptation on; None when there was none."""
        if not self._adaptations:
            return None
        start, first = self._adaptations[0]
        measured = Measured(
            candidate=first,
            total_steps=self.assignment.spec.total_steps,
            price=self.assignment.price,
            taken=_branch(self.outcome, start),
            control=_branch(self.control, start),
            adaptations_after=len(self._adaptations) - 1,
        )
        return RewardComputer(self.config.reward).compute(measured)

    def _run_ahead(self) -> tuple[float, float]:
        """Let a copy wait to its end: what that is worth more than before, and whether something was undone."""
        before, undone_before = self._value, self.outcome.culled + self.outcome.rollbacks
        self._outcome = self._episode.branch().finish()
        if self.config.objective == "utility":
            self._value = self.utility
        else:
            found = self.components
            self._value = 0.0 if found is None else found.total
        undone = self._outcome.culled + self._outcome.rollbacks
        return self._value - before, float(undone > undone_before)


@lru_cache(maxsize=512)
def control_run(spec: HostSpec, repeat: int, interval: float) -> Outcome:
    """The host trained without growth; kept, because every price and budget has the same one."""
    return train_plain(spec, repeat=repeat, follow=interval)


def _branch(outcome: Outcome, start: int) -> Branch:
    course = [point for point in outcome.course if point.step >= start]
    return Branch(
        steps=tuple(point.step for point in course),
        losses=tuple(point.loss for point in course),
        training_flops=tuple(point.training_flops - course[0].training_flops for point in course),
        num_parameters=outcome.num_parameters,
        rollbacks=outcome.rollbacks,
        culls=outcome.culled,
        non_finite=sum(not math.isfinite(point.loss) for point in course),
    )


def _worst(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
