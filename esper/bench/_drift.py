"""What a process holds, sampled over a long run, and how that changes.

Drift is the median of the last quarter of the samples less that of the first quarter. A slope is that of
Theil and Sen: the median over all pairs of samples, which a few outliers do not move.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from esper.errors import UnsupportedError

__all__ = ["descriptors", "drift", "resident_mb", "slope", "threads"]

_PROC = Path("/proc/self")


def resident_mb() -> float:
    """Memory of this process that lies in RAM, after a collection of garbage.

    Raises:
        UnsupportedError: the system has no ``/proc``.
    """
    gc.collect()
    pages = int(_read("statm").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors() -> int:
    """Open files and sockets.

    Raises:
        UnsupportedError: the system has no ``/proc``.
    """
    if not (_PROC / "fd").is_dir():
        raise UnsupportedError("expected /proc/self/fd, by which open files are counted: this needs Linux")
    return len(list((_PROC / "fd").iterdir())) - 1  # the listing itself


def threads() -> int:
    """Threads that Python knows of."""
    return threading.active_count()


def drift(samples: Sequence[float]) -> float:
    """Last quarter less first quarter, by medians; needs four samples."""
    quarter = len(samples) // 4
    assert quarter, f"{len(samples)} samples"
    return statistics.median(samples[-quarter:]) - statistics.median(samples[:quarter])


def slope(places: Sequence[float], samples: Sequence[float]) -> float:
    """Median change of the samples for a change of one in their places; needs two different places."""
    points = zip(places, samples, strict=True)
    return statistics.median(
        (y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2
    )


def _read(name: str) -> str:
    try:
        return (_PROC / name).read_text()
    except FileNotFoundError:
        raise UnsupportedError(
            f"expected /proc/self/{name}, which tells the memory in use: this needs Linux"
        ) from None
