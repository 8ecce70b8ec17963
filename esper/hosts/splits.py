"""Cutting a labelled data set into parts with equal shares of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError

__all__ = ["stratified_split"]


def stratified_split(
    labels: NDArray[np.integer], fractions: Sequence[float], *, seed: int
) -> list[NDArray[np.int64]]:
    """Return disjoint index arrays, each with about its fraction of every class.

    Within a class the cut points are rounded cumulative fractions, so every index lands in exactly one part.

    Args:
        labels: (n,) class of each sample.
        fractions: Of the parts; they add up to one.
        seed: Of the shuffle; keep it fixed, or results on different splits get compared.

    Returns:
        One shuffled index array a part.

    Raises:
        ConfigError: If the fractions are not positive or do not add up to one.
    """
    if min(fractions) <= 0.0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise ConfigError(f"split fractions must be positive and add up to 1, got {list(fractions)}")
    rng = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]
