"""Which states a table is to have, in an order of which every beginning is a fair table already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random

from esper.errors import ConfigError
from esper.tamiyo.environment.config import BUDGETS
from esper.tamiyo.environment.families import sample_host
from esper.tamiyo.environment.specs import HostSpec, Split, derived_seed
from esper.tamiyo.oracle.records import Moment

__all__ = ["GROWN_AT", "Quota", "StatePlan", "plan_states"]

Quota = Mapping[str, Mapping[Split, int]]
"""Family -> split -> states, each of a host of its own."""

_MOMENTS: tuple[Moment, ...] = ("early", "early", "grown", "early", "late")
_SHIFTED: tuple[Moment, ...] = ("shifted", "early", "shifted", "grown", "shifted")
_SHARES: Mapping[Moment, tuple[float, float]] = {
    "early": (0.05, 0.15),
    "late": (0.3, 0.5),
    "grown": (0.15, 0.3),
    "shifted": (0.02, 0.06),
}
"""Share of the run at which the state lies; after a shift, share of the run since the shift."""

GROWN_AT = 0.05


@dataclass(frozen=True)
class StatePlan:
    """One state to try.

    Attributes:
        spec: The host.
        moment: Why this state.
        step: Optimizer steps before the decision, at least: a run is asked at its decision points.
        budget: Parameters of host and seeds over the host's, at most.
        grown_at: Step of an earlier growth, drawn at random among what is offered there; None without one.
    """

    spec: HostSpec
    moment: Moment
    step: int
    budget: float
    grown_at: int | None = None

    @property
    def state_id(self) -> str:
        """Unique in a table; good as a file name."""
        return f"{self.spec.family}-{self.spec.split}-{self.spec.number}-{self.moment}"


def plan_states(quota: Quota, *, most_steps: int | None = None) -> list[StatePlan]:
    """List the states that ``quota`` asks for, spread evenly over families and splits.

    Args:
        quota: What is wanted.
        most_steps: Pass over hosts whose runs are longer, to afford more of them; but not over runs whose data
            shift, all of which are long. Of language models those that see most tokens a parameter are lost.

    Raises:
        ConfigError: A family or a split that does not exist, or a negative count.
    """
    counts = {(family, split): num for family, splits in quota.items() for split, num in splits.items()}
    if not counts or min(counts.values()) < 0:
        raise ConfigError(f"expected states of at least one family, none of them negative, got {counts}")
    hosts = {key: _hosts(*key, most_steps) for key in counts}
    return [_plan(next(hosts[key])) for key in _spread(counts)]


def _hosts(family: str, split: Split, most_steps: int | None) -> Iterator[HostSpec]:
    for number in count():
        spec = sample_host(family, split, number)
        if most_steps is None or spec.shift is not None or spec.total_steps <= most_steps:
            yield spec


def _spread(counts: Mapping[tuple[str, Split], int]) -> Iterator[tuple[str, Split]]:
    """Member k of n falls at (k + 1/2) / n, so every beginning holds its share of every group."""
    for _, key in sorted(((k + 0.5) / num, key) for key, num in counts.items() for k in range(num)):
        yield key


def _plan(spec: HostSpec) -> StatePlan:
    random = Random(derived_seed("oracle", spec.name))
    moments = _MOMENTS if spec.shift is None else _SHIFTED
    moment = moments[spec.number % len(moments)]
    low, high = _SHARES[moment]
    total = spec.total_steps
    step = round((low + random.random() * (high - low)) * total)
    budget = BUDGETS[int(random.random() * len(BUDGETS))]
    if moment == "shifted":
        assert spec.shift is not None
        step += spec.shift.at[int(random.random() * len(spec.shift.at))]
        return StatePlan(spec, moment, min(step, total - 1), budget)
    return StatePlan(spec, moment, step, budget, round(GROWN_AT * total) if moment == "grown" else None)
