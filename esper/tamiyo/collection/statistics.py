"""What the collector has done so far, counted; every signal received ends in exactly one of the counts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.oona.subscriber import SubscriberStats
from esper.tamiyo.collection.buffer import HealthSignalBuffer
from esper.tamiyo.collection.latency import SlidingWindow
from esper.tamiyo.collection.priority import Priority
from esper.tamiyo.collection.ring import SignalBlock

__all__ = ["CollectionStatistics", "CollectionStats", "snapshot"]


@dataclass(frozen=True, kw_only=True)
class CollectionStats:
    """The collector at one moment; counts are since it was made.

    ``received + recovered == errors + ready + anomalies + sampled + thinned + unidentified``, and of
    the first four, ``passed``, each is ``available``, ``waiting`` or dropped from the buffer.

    Attributes:
        messages: Messages read, of all topics.
        ignored: Of them, those of types that are of no use here.
        malformed: Of them, those refused here, beside what the client refused (``rejected``).
        missed: Messages that the client found to be missing.
        rejected: Frames that the client refused.
        received: Health signals in the messages.
        recovered: Signals made of error-recovery events.
        errors: Passed because of errors.
        ready: Passed because a seed is ready for its next stage.
        anomalies: Passed as anomalies.
        sampled: Passed as every tenth normal signal.
        thinned: Normal signals that were not processed.
        unidentified: Signals of more layers and seeds than the collector has room for.
        dropped_normal: Normal signals that the full buffer lost.
        dropped_high: Signals of high priority that it lost, with no normal one left.
        available: Signals processed, kept in the window until newer ones push them out.
        waiting: Signals in the buffer.
        waiting_high: Of them, those in the priority lane.
        buffer_fill: Share of the buffer taken, in [0, 1].
        kept: Signals that can be asked for now.
        num_runs: Runs heard of.
        num_series: Layers and seeds known.
        bad_timestamps: Signals whose time of publishing is no number, or lies in the future; they have no latency.
        signals_per_s: Received a second, over the sliding window.
        latency_p50_ms: From publishing to being available, over the sliding window; NaN where nothing came.
        latency_p95_ms: 95th percentile of the same.
        latency_p99_ms: 99th percentile of the same.
        silent_s: Seconds since the last signal, or since the start.
        alerts: What is wrong now: name -> sentence.
    """

    messages: int
    ignored: int
    malformed: int
    missed: int
    rejected: int
    received: int
    recovered: int
    errors: int
    ready: int
    anomalies: int
    sampled: int
    thinned: int
    unidentified: int
    dropped_normal: int
    dropped_high: int
    available: int
    waiting: int
    waiting_high: int
    buffer_fill: float
    kept: int
    num_runs: int
    num_series: int
    bad_timestamps: int
    signals_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    silent_s: float
    alerts: dict[str, str]

    @property
    def passed(self) -> int:
        """Signals that the filter let through, for whatever reason."""
        return self.errors + self.ready + self.anomalies + self.sampled

    def __str__(self) -> str:
        return (
            f"{self.received} signals of {self.num_runs} runs ({self.signals_per_s:.0f} a second), "
            f"{self.passed} passed, {self.dropped_normal + self.dropped_high} dropped, {self.waiting} waiting, "
            f"latency p50 {self.latency_p50_ms:.2f} ms, p99 {self.latency_p99_ms:.2f} ms"
        )

    def as_dict(self) -> dict[str, float | dict[str, str]]:
        """All fields and ``passed``, for a log or a metrics endpoint."""
        return {**dataclasses.asdict(self), "passed": self.passed}


class CollectionStatistics:
    """Counts as signals go by.

    Args:
        window_s: Length of the sliding window of rate and latencies, seconds.
        clock_tolerance_s: How far in the future a timestamp may lie and still count as now.

    Raises:
        ConfigError: ``window_s`` is not positive.
    """

    def __init__(self, window_s: float = 10.0, clock_tolerance_s: float = 1.0) -> None:
        now = time.monotonic()
        self.messages = self.ignored = self.malformed = 0
        self.received = self.recovered = self.unidentified = 0
        self.available = self.bad_timestamps = 0
        self.by_priority = np.zeros(len(Priority), dtype=np.int64)
        self.window = SlidingWindow(window_s, now)
        self.last_signal_s = now
        self._clock_tolerance_s = clock_tolerance_s

    def began(self) -> None:
        """Silence is counted from here."""
        self.last_signal_s = time.monotonic()

    def signals_came(self, num: int) -> None:
        """Count signals of a message."""
        self.received += num
        self.last_signal_s = time.monotonic()
        self.window.add_received(num, self.last_signal_s)

    def filtered(self, priorities: NDArray[np.int64]) -> None:
        """Count what the filter said."""
        self.by_priority += np.bincount(priorities, minlength=len(Priority))

    def became_available(self, block: SignalBlock) -> None:
        """Count processed signals and their latencies."""
        self.available += len(block)
        latencies_s = time.time() - block.published
        # false for NaN too; -inf is a time that is infinitely far ahead, +inf one that never was
        usable = (latencies_s >= -self._clock_tolerance_s) & (latencies_s < math.inf)
        num_usable = int(np.count_nonzero(usable))
        self.bad_timestamps += len(block) - num_usable
        if num_usable:
            known = latencies_s if num_usable == len(block) else latencies_s[usable]
            self.window.add_latencies(known, time.monotonic())

    def count(self, priority: Priority) -> int:
        """Signals to which the filter gave a priority."""
        return int(self.by_priority[priority])


def snapshot(
    counts: CollectionStatistics,
    *,
    buffer: HealthSignalBuffer,
    client: SubscriberStats,
    kept: int,
    num_runs: int,
    num_series: int,
    alerts: Mapping[str, str],
) -> CollectionStats:
    """Everything that is counted anywhere, at this moment."""
    now = time.monotonic()
    return CollectionStats(
        messages=counts.messages,
        ignored=counts.ignored,
        malformed=counts.malformed,
        missed=client.missed,
        rejected=client.num_rejected,
        received=counts.received,
        recovered=counts.recovered,
        errors=counts.count(Priority.ERROR),
        ready=counts.count(Priority.READY),
        anomalies=counts.count(Priority.ANOMALY),
        sampled=counts.count(Priority.NORMAL),
        thinned=counts.count(Priority.THINNED),
        unidentified=counts.unidentified,
        dropped_normal=buffer.drops.normal,
        dropped_high=buffer.drops.high,
        available=counts.available,
        waiting=len(buffer),
        waiting_high=buffer.num_high,
        buffer_fill=buffer.fill,
        kept=kept,
        num_runs=num_runs,
        num_series=num_series,
        bad_timestamps=counts.bad_timestamps,
        signals_per_s=counts.window.rate(now),
        latency_p50_ms=counts.window.latency_ms(0.50, now),
        latency_p95_ms=counts.window.latency_ms(0.95, now),
        latency_p99_ms=counts.window.latency_ms(0.99, now),
        silent_s=now - counts.last_signal_s,
        alerts=dict(alerts),
    )
