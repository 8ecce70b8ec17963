"""Priorities in a segment tree: sums, the smallest, and drawing in proportion, many at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SegmentTree"]


class SegmentTree:
    """Sums and minima over leaves, each update and each lookup in O(log capacity) vectorised levels.

    Node i has the children 2i and 2i + 1; the leaves are the last ``size`` nodes. Every inner node is summed anew
    from its children, so rounding does not pile up over millions of updates.

    Args:
        capacity: Number of leaves in use; the rest weigh nothing.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self.size = 1 << (capacity - 1).bit_length()
        self._sum = np.zeros(2 * self.size)
        self._min = np.full(2 * self.size, np.inf)

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return float(self._sum[1])

    @property
    def minimum(self) -> float:
        """Smallest leaf above 0; inf when there is none."""
        return float(self._min[1])

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        leaves: NDArray[np.float64] = self._sum[np.asarray(index) + self.size]
        return leaves

    def set(self, index: NDArray[np.int64], weight: NDArray[np.float64]) -> None:
        """Give the leaves ``index`` [n] the weights [n], at least 0; of an index given twice the last counts."""
        assert np.isfinite(weight).all()
        assert (weight >= 0).all()
        node = np.asarray(index, dtype=np.int64) + self.size
        self._sum[node] = weight
        self._min[node] = np.where(weight > 0, weight, np.inf)
        node = np.unique(node >> 1)
        while node.size and node[0] >= 1:
            self._sum[node] = self._sum[2 * node] + self._sum[2 * node + 1]
            self._min[node] = np.minimum(self._min[2 * node], self._min[2 * node + 1])
            node = np.unique(node >> 1)

    def find(self, mass: NDArray[np.float64]) -> NDArray[np.int64]:
        """Leaf in which each point of [0, total) lies when the leaves lie side by side [n]."""
        node = np.ones(mass.shape, dtype=np.int64)
        mass = mass.astype(np.float64)
        while node.size and node[0] < self.size:
            left = self._sum[2 * node]
            # a point that rounding puts past the last leaf falls back into the one before, never into an empty one
            right = (mass >= left) & (self._sum[2 * node + 1] > 0)
            mass = np.where(right, mass - left, mass)
            node = 2 * node + right
        return node - self.size
