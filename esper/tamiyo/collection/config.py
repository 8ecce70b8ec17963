"""Settings of the health collector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esper.errors import ConfigError

__all__ = ["CollectionConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionConfig:
    """How signals are filtered, kept and reported.

    Attributes:
        anomaly_threshold: Standard deviations beyond which a health score is an anomaly.
        history_size: Health scores kept of each layer and seed to judge that by.
        min_history: Scores before anything can be an anomaly.
        sigma_floor: Least standard deviation of a health score, for histories that are flat.
        normal_every: One in so many normal signals of a layer or seed passes.
        window_size: Processed signals that are kept to be asked for, of all runs together.
        max_keys: Layers and seeds that may be known at once, of all runs together. Those of signals that wait
            or are kept cannot be given up: with fewer than ``window_size``, a flood of new names is left out.
        poll_messages: Messages to read before others on the event loop have their turn.
        statistics_window_s: Length of the sliding window of rate and latencies, seconds.
        report_interval_s: Seconds between two lines of statistics in the log.
        alert_interval_s: Seconds between two looks at whether something is wrong.
        alert_fill: Share of the buffer above which that is so.
        silence_s: Seconds without a signal after which that is so.
        clock_tolerance_s: Seconds by which a sender's clock may run ahead of this one before its
            timestamps are left out of the latencies.

    Raises:
        ConfigError: a value is out of range.
    """

    anomaly_threshold: float = 2.0
    history_size: int = 100
    min_history: int = 10
    sigma_floor: float = 0.01
    normal_every: int = 10
    window_size: int = 50_000
    max_keys: int = 65_536
    poll_messages: int = 32
    statistics_window_s: float = 10.0
    report_interval_s: float = 60.0
    alert_interval_s: float = 1.0
    alert_fill: float = 0.9
    silence_s: float = 30.0
    clock_tolerance_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("window_size", "max_keys", "poll_messages"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        for name in ("statistics_window_s", "report_interval_s", "alert_interval_s", "silence_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"expected {name} to be a positive number of seconds, got {value!r}")
        if not 0 < self.alert_fill <= 1:
            raise ConfigError(f"expected alert_fill in (0, 1], got {self.alert_fill!r}")
        if not (math.isfinite(self.clock_tolerance_s) and self.clock_tolerance_s >= 0):
            raise ConfigError(f"expected clock_tolerance_s of at least 0 s, got {self.clock_tolerance_s!r}")
        # the filter checks the other five, which it can also be made with directly
