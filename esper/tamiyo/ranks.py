"""Processes that train one model together, and how they come to the same answer before it changes.

Every rank runs the same strategist. What only one of them can know is shared at points that all of
them reach alike, told by the step number: losses are averaged, rank 0's facts and its policy count.
No rank may act on a figure that another rank does not have (LIGHTNING.md §4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

__all__ = ["Ranks", "mean_of"]


class Ranks:
    """The ranks of a run. This class is a run of one process: everything is agreed upon at once.

    A class for several processes overrides :meth:`exchange`, :meth:`attempt`, :meth:`gather` and
    :meth:`together`; each is then a collective operation, which every rank has to call alike.

    Attributes:
        size: Ranks that have to agree.
        rank: This one's number; rank 0 decides.
        num_processes: Processes that train the model, whether they have to agree or not.
        closed: Why nothing may be grown in this run; empty when it may.
        may_change: Whether the model may be changed at this moment: with several processes only inside
            :meth:`together`.
    """

    size: int = 1
    rank: int = 0
    num_processes: int = 1
    closed: str = ""
    may_change: bool = True

    def exchange(self, about: str, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of ranks.

        Args:
            about: What it is; ranks that speak of different things fail together.
            value: Plain types (numbers, strings, bytes, lists, mappings).
        """
        return [value]

    def attempt(self, about: str, compute: Callable[[], Any]) -> list[Any]:
        """Every rank's answer of ``compute``, which is of plain types.

        Raises:
            EsperError: It raised one on some rank; then all ranks raise, so that none acts alone.
        """
        return [compute()]

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows one below the other, on this rank's device. Shape: [n, F] to [Σn, F]."""
        return x

    def together(self) -> AbstractContextManager[None]:
        """A block in which an error on one rank becomes an error on all."""
        return nullcontext()

    def first(self, about: str, value: Any) -> Any:
        """Rank 0's ``value``."""
        if self.size == 1:
            return value
        return self.exchange(about, value if self.rank == 0 else None)[0]

    def measure(self, about: str, compute: Callable[[], Sequence[float | None]]) -> list[float | None]:
        """The mean of each figure that ``compute`` returns, over the ranks that have it.

        Returns:
            NaN where one is, None where no rank has a figure.

        Raises:
            EsperError: See :meth:`attempt`.
        """
        if self.size == 1:
            return list(compute())
        return mean_of(self.attempt(about, lambda: list(compute())))

    def objection(self, about: str, reason: str) -> str:
        """The first rank's ``reason`` that is not empty; empty when nobody objects."""
        if self.size == 1:
            return reason
        for rank, given in enumerate(self.exchange(about, reason)):
            if given:
                return f"{given} (rank {rank})"
        return ""


def mean_of(answers: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean of each column over the rows that have it; None where none has.

    Summed exactly, so that the order of ranks makes no difference; NaN and inf come through.
    """
    means: list[float | None] = []
    for column in zip(*answers, strict=True):
        known = [value for value in column if value is not None]
        means.append(_mean(known) if known else None)
    return means


def _mean(values: Sequence[float]) -> float:
    finite = all(math.isfinite(value) for value in values)
    return (math.fsum(values) if finite else sum(values)) / len(values)
