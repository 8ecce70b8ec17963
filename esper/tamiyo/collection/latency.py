"""Counts and latencies over a sliding window of time, in constant memory.

The window is made of 100 slots; the oldest whole slot leaves when a new one begins, so that rates cover
between 100 and 101 slots and are divided by exactly the time they cover. Latencies fall into 48 bins a
decade from a microsecond to 1,000 seconds, and a percentile is the upper edge of its bin: at most 4.9 % too
high and never too low. A histogram rather than a sample of latencies, because the 99th percentile of
a sample of 1,000 rests on ten of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError

__all__ = ["SlidingWindow"]

_SLOTS = 100
_BINS_PER_DECADE = 48
_DECADES = 9
_LEAST_S = 1e-6
_NUM_BINS = _BINS_PER_DECADE * _DECADES + 2  # one for what is shorter, one for what is longer


class SlidingWindow:
    """What happened in the last ``window_s`` seconds.

    Args:
        window_s: Its length in seconds.
        now: The present, in seconds of a clock that never goes back (``time.monotonic``), as everywhere here.

    Raises:
        ConfigError: ``window_s`` is not positive.
    """

    def __init__(self, window_s: float, now: float) -> None:
        if not (math.isfinite(window_s) and window_s > 0):
            raise ConfigError(f"expected a statistics window of more than 0 s, got {window_s}")
        self.window_s = window_s
        self._slot_s = window_s / _SLOTS
        self._began = now
        self._slot = 0  # number of the slot that is being filled, from the beginning
        self._received = np.zeros(_SLOTS + 1, dtype=np.int64)
        self._latencies = np.zeros((_SLOTS + 1, _NUM_BINS), dtype=np.int64)

    def add_received(self, num: int, now: float) -> None:
        """Count signals that came in."""
        self._received[self._place(now)] += num

    def add_latencies(self, latencies_s: NDArray[Any], now: float) -> None:
        """Count latencies in seconds ``[n]``; each must be a number, negative ones count as none."""
        with np.errstate(divide="ignore"):
            decades = np.log10(np.maximum(latencies_s, 0.0) / _LEAST_S)
        bins = np.clip(np.floor(decades * _BINS_PER_DECADE), -1, _NUM_BINS - 2).astype(np.int64) + 1
        self._latencies[self._place(now)] += np.bincount(bins, minlength=_NUM_BINS)

    def rate(self, now: float) -> float:
        """Signals received a second, over the window or the time since the beginning, whichever is shorter."""
        self._place(now)
        covered_s = now - self._began - self._slot_s * max(0, self._slot - _SLOTS)
        return float(self._received.sum()) / covered_s if covered_s > 0 else 0.0

    def latency_ms(self, fraction: float, now: float) -> float:
        """A percentile of the latencies in the window, milliseconds; NaN where there are none.

        Args:
            fraction: 0.99 for the 99th percentile.
            now: The present.
        """
        self._place(now)
        counts = self._latencies.sum(axis=0)
        num = int(counts.sum())
        if not num:
            return math.nan
        index = int(np.searchsorted(np.cumsum(counts), math.ceil(fraction * num)))
        if index == _NUM_BINS - 1:
            return math.inf
        return float(1000 * _LEAST_S * 10 ** (index / _BINS_PER_DECADE))

    def _place(self, now: float) -> int:
        """Row of the slot that ``now`` lies in, after clearing the slots in between."""
        slot = max(self._slot, int((now - self._began) / self._slot_s))
        if slot - self._slot > _SLOTS:
            self._received[:] = 0
            self._latencies[:] = 0
        else:
            for passed in range(self._slot + 1, slot + 1):
                self._received[passed % (_SLOTS + 1)] = 0
                self._latencies[passed % (_SLOTS + 1)] = 0
        self._slot = slot
        return slot % (_SLOTS + 1)
