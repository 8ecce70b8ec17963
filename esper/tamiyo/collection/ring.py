"""Signals of several runs as columns, and a ring of them in memory that is set aside once.

Shapes: ``n`` signals of a block, ``C`` signals that a ring has room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.signal_table import SignalTable
from esper.tamiyo.collection.keys import KeyTable

__all__ = ["SignalBlock", "SignalRing"]

_ROWS: tuple[tuple[int, Any], ...] = ((13, np.float64), (6, np.uint64), (1, np.bool_), (3, np.int64))
_KEY, _PRIORITY, _SEQUENCE = range(3)


@dataclass(frozen=True, slots=True)
class SignalBlock:
    """Signals that passed the filter.

    Attributes:
        figures: ``[13, n]`` float64: the float columns of :class:`SignalTable`, and when its message was
            published (Unix seconds).
        counts: ``[6, n]`` uint64, as there.
        flags: ``[1, n]`` bool, as there.
        tags: ``[3, n]`` int64: key, priority, and position in the order of arrival.
    """

    figures: NDArray[np.float64]
    counts: NDArray[np.uint64]
    flags: NDArray[np.bool_]
    tags: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        table: SignalTable,
        keys: NDArray[np.int64],
        priorities: NDArray[Any],
        *,
        published: float,
        first: int,
    ) -> SignalBlock:
        """The signals of a table whose priority is not ``THINNED``, in its order.

        Args:
            table: ``m`` signals.
            keys: Key of each ``[m]``.
            priorities: Priority of each ``[m]``.
            published: When the table was published, Unix seconds.
            first: Position of the table's first signal in the order of arrival.
        """
        chosen = np.flatnonzero(priorities)
        floats, counts, flags = table.blocks
        figures = np.empty((13, len(chosen)))
        figures[:12] = floats[:, chosen]
        figures[12] = published
        tags = np.empty((3, len(chosen)), dtype=np.int64)
        tags[_KEY], tags[_PRIORITY], tags[_SEQUENCE] = keys[chosen], priorities[chosen], first + chosen
        return cls(figures, counts[:, chosen], flags[:, chosen], tags)

    @property
    def keys(self) -> NDArray[np.int64]:
        """Series of each signal ``[n]``."""
        return self.tags[_KEY]

    @property
    def priorities(self) -> NDArray[np.int64]:
        """Priority of each signal ``[n]``."""
        return self.tags[_PRIORITY]

    @property
    def sequence(self) -> NDArray[np.int64]:
        """Position of each signal in the order of arrival ``[n]``."""
        return self.tags[_SEQUENCE]

    @property
    def published(self) -> NDArray[np.float64]:
        """When each signal's message was published, Unix seconds ``[n]``."""
        return self.figures[12]

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        """All four arrays."""
        return self.figures, self.counts, self.flags, self.tags

    def select(self, which: NDArray[Any] | slice) -> SignalBlock:
        """Some of the signals: a mask, indices, or a slice."""
        return SignalBlock(*(column[:, which] for column in self.columns))

    def joined(self, other: SignalBlock) -> SignalBlock:
        """These signals, then those."""
        return SignalBlock(
            *(np.concatenate(pair, axis=1) for pair in zip(self.columns, other.columns, strict=True))
        )

    def table(self, keys: KeyTable) -> SignalTable:
        """The signals as messages carry them; their runs are forgotten."""
        series = [keys.named(key) for key in self.keys.tolist()]
        layer_ids = tuple(each.layer_id for each in series)
        seed_ids = tuple(each.seed_id for each in series)
        return SignalTable.of_blocks(layer_ids, seed_ids, self.figures[:12], self.counts, self.flags)

    def __len__(self) -> int:
        return self.tags.shape[1]


class SignalRing:
    """First in, first out, with room for ``C`` signals.

    Args:
        capacity: ``C``, positive.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, capacity
        self.capacity = capacity
        # pages of it become memory when first written to
        self._columns = tuple(np.empty((rows, capacity), dtype) for rows, dtype in _ROWS)
        self._start = self._num = 0

    def push(self, block: SignalBlock) -> None:
        """Append a block for which there is room."""
        num = len(block)
        assert num <= self.capacity - self._num, f"{num} signals into room for {self.capacity - self._num}"
        start = (self._start + self._num) % self.capacity
        before_end = min(num, self.capacity - start)
        for mine, given in zip(self._columns, block.columns, strict=True):
            mine[:, start : start + before_end] = given[:, :before_end]
            if before_end < num:
                mine[:, : num - before_end] = given[:, before_end:]
        self._num += num

    def pop(self, num: int) -> SignalBlock:
        """Take the oldest ``num`` signals out, or as many as there are."""
        num = min(num, self._num)
        block = self._read(num)
        self.drop(num)
        return block

    def drop(self, num: int) -> None:
        """Forget the oldest ``num`` signals."""
        assert num <= self._num, f"{num} of {self._num} signals"
        self._num -= num
        # an empty ring begins anew at the front, so that one that is seldom full touches little memory
        self._start = (self._start + num) % self.capacity if self._num else 0

    def keep_newest(self, block: SignalBlock) -> None:
        """Append a block of any length, forgetting the oldest signals where there is no room."""
        num = len(block)
        self.drop(min(self._num, max(0, self._num + num - self.capacity)))
        self.push(block if num <= self.capacity else block.select(slice(num - self.capacity, num)))

    def block(self) -> SignalBlock:
        """A copy of all signals, oldest first."""
        return self._read(self._num)

    def tags(self) -> NDArray[np.int64]:
        """Key, priority and order of arrival ``[3, num]`` of all signals; a copy only where it must be."""
        tags = self._columns[3]
        end = self._start + self._num
        if end <= self.capacity:
            return tags[:, self._start : end]
        return np.concatenate((tags[:, self._start :], tags[:, : end - self.capacity]), axis=1)

    def at(self, positions: NDArray[np.int64]) -> SignalBlock:
        """A copy of the signals at some positions, 0 for the oldest."""
        places = (self._start + positions) % self.capacity
        return SignalBlock(*(column[:, places] for column in self._columns))

    def __len__(self) -> int:
        return self._num

    def _read(self, num: int) -> SignalBlock:
        end = self._start + num
        if end <= self.capacity:
            return SignalBlock(*(column[:, self._start : end].copy() for column in self._columns))
        rest = end - self.capacity
        return SignalBlock(
            *(
                np.concatenate((column[:, self._start :], column[:, :rest]), axis=1)
                for column in self._columns
            )
        )
