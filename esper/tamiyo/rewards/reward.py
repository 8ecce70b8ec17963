"""The reward of a decision, from what was measured of it and of its control."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from esper.errors import ConfigError
from esper.messages import Count
from esper.tamiyo.rewards import components as parts
from esper.tamiyo.rewards.branch import Branch, Outcome, kind_of
from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS, Horizon, RewardConfig

__all__ = ["HorizonReward", "Reward", "RewardComputer"]


class HorizonReward(msgspec.Struct, frozen=True, kw_only=True):
    """The reward up to one horizon.

    Attributes:
        step: Last measured point that belongs to it.
        total: Weighted sum of the components, over the sum of the weights; in [−1, 1].
        components: Name -> value, see :mod:`esper.tamiyo.rewards.components`.
        utility: U in nats, priced by the run's own λ; −inf for a loss that was not finite.
    """

    step: Count
    total: float
    components: dict[str, float]
    utility: float


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision has earned.

    Attributes:
        total: Weighted mean of the horizons; where not all of those with a weight are over, that of the
            furthest that is.
        utility: At the furthest horizon.
        horizons: Those that are over, by name.
        provenance: ``itself`` (WAIT), ``control``, or ``fitted ± se`` with the standard error in nats at the end.
        final: Every horizon is over, so nothing here will change.
        new_kind: Kind of adaptation that succeeded for the first time; empty otherwise. Give it as
            ``known`` from now on in the same run.
    """

    total: float
    utility: float
    horizons: dict[Horizon, HorizonReward]
    provenance: str
    final: bool
    new_kind: str = ""

    @property
    def components(self) -> dict[str, float]:
        """The components at the furthest horizon."""
        return self.horizons[max(self.horizons, key=HORIZONS.index)].components


class RewardComputer:
    """Computes rewards; keeps nothing between them, so the same outcome always earns the same.

    What GROWTH.md §3.6 saw being farmed, and what is done about each:

    - *Germinating everything early and claiming the host's own progress*: a gain is one over the control,
      which has the host's own progress as well.
    - *Indispensable but useless seeds*: nothing is measured by removing a seed; one whose run is no better
      than the control earns nothing, and pays for its parameters and FLOPs.
    - *Fossilising at a peak*: no stage of a seed enters; the loss at the horizon does, by default at the run's end,
      and a loss counts as reached (speed) only where the run stays there.
    - *Germinate→prune loops*: a cull costs safety, its FLOPs stay charged, parameters come back to
      where they were, trying is not innovation, and shaping telescopes to nothing.
    - *The cheapest module always winning*: parameters are priced on the whole model's logarithmic scale, at λ,
      never as a gain divided by a cost, so a module that does nothing earns nothing however small it is.

    Args:
        config: Weights, horizons and scales.
    """

    def __init__(self, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()

    def compute(
        self, outcome: Outcome, *, over: bool = True, known: Collection[str] = frozenset()
    ) -> Reward | None:
        """Reward an outcome.

        Args:
            outcome: What was measured.
            over: The run has ended, so that horizons that reach beyond its last point are over too.
            known: Kinds of adaptation that have succeeded before in this run.

        Returns:
            None where there is nothing to compare with, or no horizon is over.

        Raises:
            ConfigError: Speed is to be in seconds, and they were not measured.
        """
        if outcome.provenance == "none":
            return None
        control = outcome.taken if outcome.control is None or outcome.is_wait else outcome.control
        if self.config.speed_cost == "seconds" and not (outcome.taken.seconds and control.seconds):
            raise ConfigError(
                "RewardConfig has speed_cost='seconds', but the outcome has no seconds; measure them in both "
                "branches, or use speed_cost='flops'"
            )
        start, last = outcome.taken.steps[0], outcome.taken.steps[-1]
        reached: dict[Horizon, HorizonReward] = {}
        for horizon in HORIZONS:
            end = start + round(self.config.horizon_share(horizon) * outcome.total_steps)
            if over or last >= min(end, outcome.total_steps):
                reached[horizon] = self._at(outcome, control, end, known, horizon)
        if not reached:
            return None
        weighed = [h for h in HORIZONS if self.config.horizon_weight(h) > 0]
        furthest = list(reached)[-1]
        total = reached[furthest].total
        if all(h in reached for h in weighed):
            weights = {h: self.config.horizon_weight(h) for h in weighed}
            total = sum(w * reached[h].total for h, w in weights.items()) / sum(weights.values())
        new = bool(furthest == HORIZONS[-1] and reached[furthest].components["innovation"] > 0)
        return Reward(
            total=total,
            utility=reached[furthest].utility,
            horizons=reached,
            provenance=outcome.provenance,
            final=len(reached) == len(HORIZONS),
            new_kind=kind_of(outcome.candidate) if new else "",
        )

    def _at(
        self, outcome: Outcome, control: Branch, end: int, known: Collection[str], horizon: Horizon
    ) -> HorizonReward:
        config = self.config
        taken, control = outcome.taken.until(end), control.until(end)
        price = outcome.price
        stderr = outcome.control_stderr[len(control.steps) - 1] if outcome.control_stderr else 0.0
        values = {
            "accuracy": parts.accuracy(taken, control, config, stderr),
            "speed": parts.speed(taken, control, config, stderr),
            "memory": parts.memory(taken, control, config, price),
            "stability": parts.stability(taken, control, config, outcome.control_noise),
            "safety": parts.safety(taken, control, config),
            # Success is known at the end alone, and what is counted once is not to be counted thrice.
            "innovation": parts.innovation(outcome, config, known) if horizon == HORIZONS[-1] else 0.0,
        }
        if outcome.is_wait:  # it is its own control; what went wrong meanwhile is not its doing
            values = dict.fromkeys(COMPONENTS, 0.0)
        weights = {name: config.weight(name) for name in COMPONENTS}
        return HorizonReward(
            step=taken.steps[-1],
            total=sum(weights[name] * values[name] for name in COMPONENTS) / sum(weights.values()),
            components=values,
            utility=0.0 if outcome.is_wait else parts.utility(taken, control, price),
        )
