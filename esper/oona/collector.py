"""The latest health signals, as read from the bus: all that ``esper watch`` needs.

What Tamiyo decides from is filtered, buffered and counted by :mod:`esper.tamiyo.collection`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from esper.errors import ConfigError
from esper.messages import HealthSignal, Message, SignalBatch
from esper.oona.subscriber import Subscriber

if TYPE_CHECKING:
    from esper.signal_table import SignalTable

__all__ = ["Collector"]


class Collector:
    """Drains a subscriber and keeps a bounded history of health signals.

    Batches are kept as columns, so taking one costs next to nothing; objects are built of the signals that
    are asked for. What has not been heard of within the kept history (a culled seed) fades out.

    Args:
        subscriber: where to read; None when batches are handed to :meth:`add` directly.
        history: how many batches (sampled steps) to keep, at least 1.

    Attributes:
        num_batches: batches taken so far.
        num_signals: signals in them.

    Raises:
        ConfigError: ``history`` is not positive.
    """

    def __init__(self, subscriber: Subscriber | None = None, *, history: int = 64) -> None:
        if history < 1:
            raise ConfigError(f"expected a history of at least 1 batch, got {history}")
        self.subscriber = subscriber
        self.num_batches = 0
        self.num_signals = 0
        self._batches: deque[SignalBatch] = deque(maxlen=history)

    def drain(self, timeout_ms: int = 0) -> list[tuple[str, Message]]:
        """Take what the subscriber has; call it again as long as it returns something.

        Args:
            timeout_ms: how long to wait for a first message; 0 does not wait.

        Returns:
            All messages read, as ``(topic, message)``; those without signals are for the caller to use.
        """
        assert self.subscriber is not None, "a collector without a subscriber is fed with add()"
        messages = self.subscriber.poll(timeout_ms)
        for _, message in messages:
            if type(message) is SignalBatch:
                self.add(message)
        return messages

    def add(self, batch: SignalBatch) -> None:
        """Take one batch."""
        self._batches.append(batch)
        self.num_batches += 1
        self.num_signals += len(batch.table)

    @property
    def latest(self) -> SignalBatch | None:
        """The newest batch, or None before the first."""
        return self._batches[-1] if self._batches else None

    @property
    def last(self) -> dict[tuple[str, str], HealthSignal]:
        """The last kept signal of each ``(layer_id, seed_id)``; a layer's own has ``seed_id == ""``."""
        where: dict[tuple[str, str], tuple[SignalTable, int]] = {}
        for batch in self._batches:
            table = batch.table
            keys = zip(table.layer_ids, table.seed_ids, strict=True)
            where.update((key, (table, index)) for index, key in enumerate(keys))
        return {key: table.row(index) for key, (table, index) in where.items()}

    def history(self, layer_id: str, seed_id: str = "") -> list[HealthSignal]:
        """Kept signals of one layer or seed, oldest first."""
        return [
            table.row(index)
            for table in (batch.table for batch in self._batches)
            for index, key in enumerate(zip(table.layer_ids, table.seed_ids, strict=True))
            if key == (layer_id, seed_id)
        ]

    def __repr__(self) -> str:
        return f"Collector({self.num_batches} batches, {self.num_signals} signals)"
