"""The latest health signals, as read from the bus."""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from esper.errors import ConfigError
from esper.messages import HealthSignal, Message, SignalBatch
from esper.oona.subscriber import Subscriber

__all__ = ["Collector"]

_KEY = attrgetter("layer_id", "seed_id")


class Collector:
    """Drains a subscriber and keeps a bounded history of health signals.

    Taking a batch costs next to nothing; views are computed when asked for. What has not been heard of
    within the kept history (a culled seed) fades out of them.

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
        self.num_signals += len(batch.signals)

    @property
    def latest(self) -> SignalBatch | None:
        """The newest batch, or None before the first."""
        return self._batches[-1] if self._batches else None

    @property
    def last(self) -> dict[tuple[str, str], HealthSignal]:
        """The last kept signal of each ``(layer_id, seed_id)``; a layer's own has ``seed_id == ""``."""
        last: dict[tuple[str, str], HealthSignal] = {}
        for batch in self._batches:
            last.update(zip(map(_KEY, batch.signals), batch.signals, strict=True))
        return last

    def history(self, layer_id: str, seed_id: str = "") -> list[HealthSignal]:
        """Kept signals of one layer or seed, oldest first."""
        return [
            signal
            for batch in self._batches
            for signal in batch.signals
            if signal.layer_id == layer_id and signal.seed_id == seed_id
        ]

    def __repr__(self) -> str:
        return f"Collector({self.num_batches} batches, {self.num_signals} signals)"
