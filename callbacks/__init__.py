"""Lightning callbacks: the trainer's hooks translated into calls on esper."""

from __future__ import annotations

from esper.callbacks.tamiyo import TamiyoCallback

__all__ = ["TamiyoCallback"]
