"""One computing thread for processes that are about to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_thread_for_children"]


@contextmanager
def one_thread_for_children() -> Iterator[None]:
    """Let processes that start in the block compute with one thread each.

    Libraries size their thread pools by this variable while they are loaded; more threads than cores make
    small nets slower, not faster.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
