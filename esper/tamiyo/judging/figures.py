"""From trials to figures: utilities of every arm, and differences between arms, paired by host and repeat.

Repeats of a host are averaged first, and intervals resample hosts: two repeats of one host are alike. Only
matches that every arm has played count, so that all figures are of the same hosts; failed runs are played ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from esper.errors import ConfigError
from esper.report.statistics import Estimate, bootstrap_mean
from esper.tamiyo.judging.matches import Group
from esper.tamiyo.judging.trial import Trial, View, utility

__all__ = ["NONE", "ArmFigures", "Board", "Difference"]

NONE = "none"
"""Name of the arm that trains the ungrown host."""


@dataclass(frozen=True)
class Difference:
    """Utility of one arm less that of another, in nats.

    Attributes:
        estimate: Mean over hosts.
        median: Over hosts.
        better: Share of hosts on which it is positive.
    """

    estimate: Estimate
    median: float
    better: float


@dataclass(frozen=True)
class ArmFigures:
    """One arm on the hosts of a group; means are over hosts.

    Attributes:
        utility: Against the ungrown host.
        median: Of the same, over hosts.
        loss: On the test part; of runs that did not fail.
        accuracy: The same.
        parameters: Over the host's.
        flops: Over the host's.
        seconds: Of the processor, over those of the ungrown host's run.
        idle: Share of runs in which nothing was grown or recycled.
        waited: Share of a learned policy's decisions that do nothing; None where it was not asked.
        fell_back: Share of its decisions that the fallback made.
        failed: Runs.
        runs: All of them.
    """

    utility: Estimate
    median: float
    loss: float
    accuracy: float
    parameters: float
    flops: float
    seconds: float
    idle: float
    waited: float | None
    fell_back: float | None
    failed: int
    runs: int


class Board:
    """All arms on the matches of one group in one view.

    Args:
        trials: Of any groups and views.
        group: That is looked at.
        view: What is equal among arms.
        arms: That were to play; ``none`` must be one of them.

    Attributes:
        arms: The same.
        matches: Names of the matches that all arms have played.
        missing: Matches that some arm has not played yet.

    Raises:
        ConfigError: The ungrown host is not among the arms.
    """

    def __init__(self, trials: Sequence[Trial], group: Group, view: View, arms: Sequence[str]) -> None:
        if NONE not in arms:
            raise ConfigError(f"utilities are differences to the arm {NONE!r}, got arms {', '.join(arms)}")
        self.arms, self.group, self.view = tuple(arms), group, view
        table: dict[str, dict[str, Trial]] = {}
        for trial in trials:
            if trial.group == group and trial.view == view and trial.arm in arms:
                table.setdefault(trial.match, {})[trial.arm] = trial
        self._table = {match: row for match, row in table.items() if len(row) == len(self.arms)}
        self.matches = sorted(self._table)
        self.missing = len(table) - len(self._table)

    @property
    def families(self) -> list[str]:
        """Of the matches, in alphabetical order."""
        return sorted({row[NONE].family for row in self._table.values()})

    @property
    def num_hosts(self) -> int:
        """Different hosts among the matches."""
        return len({row[NONE].host for row in self._table.values()})

    def utilities(self, name: str, *, family: str = "", price: float | None = None) -> list[float]:
        """Utility of an arm on each host; at the hosts' own prices if ``price`` is None."""
        rows = self._rows(family)
        return _by_host([(row[name].host, utility(row[name], row[NONE], price=price)) for row in rows])

    def arm(self, name: str, family: str = "") -> ArmFigures:
        """Figures of one arm, on the hosts of one family or of all."""
        rows = self._rows(family)
        trials = [row[name] for row in rows]
        sound = [(row[name], row[NONE]) for row in rows if not row[name].failed]
        values = self.utilities(name, family=family)
        asked = sum(trial.asked for trial in trials)

        def over(read: Callable[[Trial, Trial], float | None]) -> float:
            found = [(t.host, value) for t, none in sound if (value := read(t, none)) is not None]
            return statistics.fmean(_by_host(found)) if found else math.nan

        return ArmFigures(
            utility=bootstrap_mean(values),
            median=statistics.median(values),
            loss=over(lambda t, _: t.test_loss),
            accuracy=over(lambda t, _: t.test_accuracy),
            parameters=over(lambda t, _: t.num_parameters / t.host_parameters),
            flops=over(lambda t, _: t.flops_ratio),
            seconds=over(lambda t, none: t.seconds / none.seconds if none.seconds else None),
            idle=over(lambda t, _: float(t.idle)),
            waited=sum(t.waited for t in trials) / asked if asked else None,
            fell_back=sum(t.fell_back for t in trials) / asked if asked else None,
            failed=sum(trial.failed for trial in trials),
            runs=len(trials),
        )

    def difference(
        self, name: str, other: str | Mapping[float, str], *, family: str = "", shape: str = ""
    ) -> Difference:
        """Utility of ``name`` less that of ``other``, on hosts of a family or a shape, or on all.

        Args:
            name: An arm.
            other: An arm, or one for each price.
            family: Only its hosts.
            shape: Only hosts of this shape.

        Raises:
            ConfigError: No match is left, or there is no arm for a price.
        """
        rows = [row for row in self._rows(family) if not shape or row[NONE].shape == shape]
        pairs = [
            (row[name].host, utility(row[name], row[NONE]) - utility(row[_of(other, row)], row[NONE]))
            for row in rows
        ]
        values = _by_host(pairs)
        return Difference(
            bootstrap_mean(values), statistics.median(values), statistics.fmean(v > 0 for v in values)
        )

    def idle(self, name: str, shape: str) -> float:
        """Share of an arm's runs on hosts of a shape in which nothing was grown or recycled; NaN without any."""
        runs = [row[name] for row in self._table.values() if row[NONE].shape == shape]
        idle = [run.idle for run in runs if not run.failed]
        return statistics.fmean(idle) if idle else math.nan

    def _rows(self, family: str) -> list[dict[str, Trial]]:
        rows = [self._table[m] for m in self.matches if family in ("", self._table[m][NONE].family)]
        if not rows:
            raise ConfigError(
                f"no match of group {self.group} {family} was played by all of {', '.join(self.arms)}"
            )
        return rows


def _of(other: str | Mapping[float, str], row: Mapping[str, Trial]) -> str:
    if isinstance(other, str):
        return other
    price = row[NONE].price
    if price not in other:
        raise ConfigError(f"no arm was chosen for the price {price:g}; prices are {sorted(other)}")
    return other[price]


def _by_host(pairs: Sequence[tuple[str, float]]) -> list[float]:
    by_host: dict[str, list[float]] = {}
    for host, value in pairs:
        by_host.setdefault(host, []).append(value)
    return [statistics.fmean(values) for _, values in sorted(by_host.items())]
