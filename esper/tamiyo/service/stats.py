"""Counts of a running service; what /metrics shows."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Histogram", "ServiceStats"]

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass
class Histogram:
    """Counts of durations in seconds, by upper bound; the last bin has none."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts with their bounds, as Prometheus wants them."""
        found, total = [], 0
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass
class ServiceStats:
    """Counts since the service was started; one thread writes, others may read.

    Attributes:
        decisions: By action that was answered.
        gated: Choices that a gate turned into WAIT, by gate.
        refusals: By cause.
        abstentions: Answers for which the decider fell back.
        repeats: Requests that had been answered before.
        busy: Requests that found the queue full.
        reports: Outcomes that runs told.
        expired: Runs that fell silent.
        rounds: Passes of the decider.
        latency: From a request's arrival to its answer.
        round_time: Of one pass, storing included.
        num_runs: Registered now.
        num_waiting: Requests in the queue now.
    """

    decisions: Counter[str] = field(default_factory=Counter)
    gated: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    abstentions: int = 0
    repeats: int = 0
    busy: int = 0
    reports: int = 0
    expired: int = 0
    rounds: int = 0
    latency: Histogram = field(default_factory=Histogram)
    round_time: Histogram = field(default_factory=Histogram)
    num_runs: int = 0
    num_waiting: int = 0
