"""Work that makes many lasting objects, without the garbage collector looking at them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's cyclic collector from running in the block.

    Tracing a deep host makes records by the ten thousand, none of which is garbage, and every collection
    walks all of them: a third of the time of attaching to a thousand layers.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
