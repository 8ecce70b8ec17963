"""Signals that wait to be processed, in two lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError
from esper.tamiyo.collection.priority import is_high
from esper.tamiyo.collection.ring import SignalBlock, SignalRing

__all__ = ["BufferDrops", "HealthSignalBuffer"]


@dataclass(slots=True)
class BufferDrops:
    """Signals lost since the buffer was made: ``normal`` ones, and ``high`` ones when no others were left."""

    normal: int = 0
    high: int = 0


class HealthSignalBuffer:
    """A priority lane and a normal lane that share one limit.

    Where there is no room the oldest normal signals go first, and only when none is left the oldest of
    high priority: what has waited longest is worth least to who decides now.

    Args:
        max_size: Signals in both lanes together.

    Raises:
        ConfigError: ``max_size`` is not positive.
    """

    def __init__(self, max_size: int = 50_000) -> None:
        if max_size < 1:
            raise ConfigError(f"expected room for at least 1 signal (buffer_size), got {max_size}")
        self.max_size = max_size
        self.drops = BufferDrops()
        self._high = SignalRing(max_size)
        self._normal = SignalRing(max_size)

    def add(self, block: SignalBlock) -> None:
        """Append signals, each to the lane of its priority, dropping and counting what has no room."""
        high = is_high(block.priorities)
        num_high = int(np.count_nonzero(high))
        if num_high:
            self._add_high(block if num_high == len(block) else block.select(high))
        if num_high < len(block):
            self._add_normal(block if not num_high else block.select(~high))

    def take(self, num: int) -> SignalBlock | None:
        """The next ``num`` signals at most: high priority first, then by arrival; None when none waits."""
        if not len(self):
            return None
        high = self._high.pop(num)
        missing = num - len(high)
        if not missing or not len(self._normal):
            return high
        normal = self._normal.pop(missing)
        return high.joined(normal) if len(high) else normal

    @property
    def num_high(self) -> int:
        """Signals in the priority lane."""
        return len(self._high)

    @property
    def fill(self) -> float:
        """Share of the room that is taken, in [0, 1]."""
        return len(self) / self.max_size

    def keys_in_use(self) -> NDArray[np.int64]:
        """Keys of all that waits."""
        return np.concatenate((self._high.tags()[0], self._normal.tags()[0]))

    def __len__(self) -> int:
        return len(self._high) + len(self._normal)

    def __repr__(self) -> str:
        return f"HealthSignalBuffer({len(self)} of {self.max_size} signals, {self.num_high} high)"

    def _add_high(self, block: SignalBlock) -> None:
        lacking = max(0, len(self) + len(block) - self.max_size)
        from_normal = min(lacking, len(self._normal))
        self._normal.drop(from_normal)
        self.drops.normal += from_normal
        self.drops.high += self._replace_oldest(self._high, block, lacking - from_normal)

    def _add_normal(self, block: SignalBlock) -> None:
        lacking = max(0, len(self) + len(block) - self.max_size)
        self.drops.normal += self._replace_oldest(self._normal, block, lacking)

    @staticmethod
    def _replace_oldest(lane: SignalRing, block: SignalBlock, lacking: int) -> int:
        """Append after dropping ``lacking`` signals: the lane's oldest, then the block's own oldest."""
        from_lane = min(lacking, len(lane))
        lane.drop(from_lane)
        lane.push(block.select(slice(lacking - from_lane, None)) if lacking > from_lane else block)
        return lacking
