"""Whether the return still rises: what the learning rate, stopping and keeping the best weights go by."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ReturnMonitor"]


@dataclass
class ReturnMonitor:
    """Smoothed return and how long ago it was best.

    The average is divided by the sum of its weights, so that it is a mean from the first observation on.

    Attributes:
        decay: Of the average.
        min_improvement: What counts as better.
        num_observed: Observations so far.
        smoothed: The average; NaN before the first observation.
        best: The best average; −inf before.
        since_best: Observations since.
    """

    decay: float
    min_improvement: float
    num_observed: int = 0
    smoothed: float = math.nan
    best: float = -math.inf
    since_best: int = 0

    def observe(self, measured: float) -> bool:
        """Take one measured return, and say whether the average is better than ever."""
        assert math.isfinite(measured)
        self.num_observed += 1
        share = (1 - self.decay) / (1 - self.decay**self.num_observed)
        self.smoothed = (
            measured if self.num_observed == 1 else self.smoothed + share * (measured - self.smoothed)
        )
        if self.smoothed > self.best + self.min_improvement:
            self.best, self.since_best = self.smoothed, 0
            return True
        self.since_best += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)
