"""How urgent a health signal is, and with that which lane it waits in and what is dropped first."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from numpy.typing import NDArray

__all__ = ["Priority", "is_high"]


class Priority(IntEnum):
    """What a signal is processed for; the first ground that holds, from the highest.

    ``ERROR``, ``READY`` and ``ANOMALY`` take the priority lane, ``NORMAL`` the other one.
    """

    THINNED = 0
    """A normal signal that is not its series' turn: counted, and not processed."""
    NORMAL = 1
    """Every tenth normal signal of a layer or seed."""
    ANOMALY = 2
    """The health score lies beyond the threshold of its own history."""
    READY = 3
    """A seed is ready for the transition to its next stage."""
    ERROR = 4
    """Non-finite values were seen, or something went wrong and was handled."""


def is_high(priorities: NDArray[Any]) -> NDArray[Any]:
    """Which of some priorities take the priority lane: bool ``[n]``."""
    high: NDArray[Any] = priorities >= Priority.ANOMALY
    return high
