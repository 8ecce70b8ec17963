"""Where the log goes on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

__all__ = ["ConsoleHandler"]


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Write to whatever standard error is at that moment.

    The live display stands in for it while it draws; a handler that holds the original would write into
    the middle of the display.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr
        super().emit(record)
