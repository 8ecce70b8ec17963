"""One ranking from several."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

__all__ = ["reciprocal_rank_fusion"]

_Item = TypeVar("_Item", bound=Hashable)


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[_Item]], *, constant: float = 60.0
) -> list[tuple[_Item, float]]:
    """Return all items with ``sum over rankings of 1 / (constant + rank)``, best first (Cormack et al. 2009).

    Ranks begin with 1; a ranking that lacks an item adds nothing. Equal scores keep the order in which the items
    first occur.

    Args:
        rankings: Items, best first; each at most once.
        constant: The paper's k; larger ones let the first ranks count less.
    """
    scores: dict[_Item, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (constant + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])
