"""Ctrl-C asks a run to stop at a safe point; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest", "uninterrupted"]


class StopRequest:
    """As a context manager it takes SIGINT: the first sets :attr:`requested`, the next one raises.

    Outside the main thread, where no handler can be set, it only holds the flag.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block has ended; a second one ends it at once.

    Does nothing outside the main thread, where none arrives, and where no Python code handles it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    handle, held_back = previous, False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal held_back
        if held_back:
            handle(number, frame)
        held_back = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held_back:
            handle(signal.SIGINT, None)
