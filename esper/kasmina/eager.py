"""Run what is compiled eagerly for a while: to trace it, to watch its layers, to measure with it.

A compiled region is one node of the autograd graph and runs none of the hooks that were added after
its compilation. Tracing, probing and measuring therefore suspend ``torch.compile`` for their batch.
They leave nothing behind in dynamo's caches: measuring the same code under other guards would compile
it once more and count against dynamo's recompile limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["EagerMode", "eagerly"]


class EagerMode:
    """Suspends ``torch.compile`` between :meth:`enter` and :meth:`leave`; either may be called twice.

    As long as nothing has imported dynamo, nothing can be compiled: then it does nothing, because the
    import alone takes a second.
    """

    def __init__(self) -> None:
        self._stance: Any = None

    def enter(self) -> None:
        """Make compiled functions and modules run the code that they were made from."""
        if self._stance is None and "torch._dynamo" in sys.modules:
            stance: Any = torch.compiler.set_stance("force_eager")
            stance.__enter__()
            self._stance = stance

    def leave(self) -> None:
        """Let them run compiled again."""
        if self._stance is not None:
            stance, self._stance = self._stance, None
            stance.__exit__(None, None, None)


@contextmanager
def eagerly() -> Iterator[None]:
    """Suspend ``torch.compile`` while the block runs."""
    mode = EagerMode()
    mode.enter()
    try:
        yield
    finally:
        mode.leave()
