"""What the collector reads from."""

from __future__ import annotations

from typing import Protocol

from esper.messages import Message
from esper.oona.subscriber import SubscriberStats

__all__ = ["TELEMETRY", "TelemetryClient"]

TELEMETRY = ("kernel", "cache", "errors", "health", "performance")
"""Short names in :data:`esper.messages.TOPICS` of the five topics that the collector subscribes to."""


class TelemetryClient(Protocol):
    """A subscription to telemetry; :class:`esper.oona.Subscriber` is one.

    Attributes:
        stats: Counts of messages that were received, missed and refused.
    """

    stats: SubscriberStats

    def poll(self, timeout_ms: int = 0, *, max_messages: int = 32) -> list[tuple[str, Message]]:
        """Take messages that are there, ``(topic, message)`` in the order of arrival; called with 0 ms."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when ``poll``, having come back with nothing, may have more."""

    @property
    def closed(self) -> bool:
        """Whether nothing will come any more."""

    def close(self) -> None:
        """Close it."""
