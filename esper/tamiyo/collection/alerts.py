"""What is wrong with the collection, said once when it begins and once when it ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.tamiyo.collection.config import CollectionConfig

__all__ = ["LOSSES", "Alerts"]

_LOG = logging.getLogger("esper.tamiyo.collection")

LOSSES = {
    "dropped_high": "signals of high priority dropped from a full buffer",
    "dropped_normal": "normal signals dropped from a full buffer",
    "missed": "messages missed on the way here",
    "rejected": "messages refused by the bus",
    "malformed": "messages refused by the collector",
    "unidentified": "signals of more layers and seeds than max_keys",
    "bad_timestamps": "signals with a time of publishing that cannot be",
}
"""Counts that should not rise -> what a rise means."""


@dataclass
class Alerts:
    """Remembers which conditions hold, so that the log gets a line when one changes and not every second.

    A loss is told for as long as it goes on: its alert ends with the first look that finds nothing new lost.

    Attributes:
        config: ``alert_fill`` and ``silence_s`` are read.
        raised: Name -> sentence of the conditions that held at the last look.
    """

    config: CollectionConfig
    raised: dict[str, str] = field(default_factory=dict)
    _before: dict[str, int] = field(default_factory=dict)

    def look(self, *, fill: float, silent_s: float, losses: Mapping[str, int]) -> None:
        """Compare with the last look and log what has changed.

        Args:
            fill: Share of the buffer that is taken.
            silent_s: Seconds since the last signal.
            losses: Total counts, by the names in :data:`LOSSES`.
        """
        now: dict[str, str] = {}
        if fill > self.config.alert_fill:
            now["buffer"] = (
                f"the buffer is {100 * fill:.0f} % full (limit {100 * self.config.alert_fill:.0f} %): "
                "what processes the signals is slower than they come"
            )
        if silent_s > self.config.silence_s:
            now["silence"] = f"no health signal for {silent_s:.0f} s (limit {self.config.silence_s:g} s)"
        for name, total in losses.items():
            new = total - self._before.get(name, 0)
            if new > 0:
                now[name] = f"{new} more {LOSSES[name]} ({total} in all)"
        self._before = dict(losses)
        for name, text in now.items():
            if name not in self.raised:
                _LOG.warning("health collection: %s", text)
        for name in self.raised:
            if name not in now:
                _LOG.info("health collection: the alert %r has ended", name)
        self.raised = now
