"""Write every decision and transition down, tell whoever listens, and publish it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.messages import (
    Decision,
    DecisionRecord,
    ErrorRecoveryEvent,
    Event,
    GovernorRecord,
    HealthSignal,
    KernelPerformance,
    Message,
    ModelPerformance,
    RunRecord,
    SignalBatch,
    Stage,
    TransitionRecord,
)

__all__ = ["Recorder"]

_log = logging.getLogger(__name__)


class _Journal(Protocol):
    def write(self, event: Event) -> None: ...


class _Publisher(Protocol):
    def publish(self, message: Message) -> bool: ...


class Recorder:
    """Sends what happens to ``growth.jsonl``, to the bus and to listeners, in this order.

    Args:
        run_id: Stands in every record.
        journal: Open journal, or None.
        publisher: Bus publisher, or None.
        listeners: Called with every event; one that raises is reported once and dropped, because a
            display must not end a training run.
    """

    def __init__(
        self,
        run_id: str,
        journal: _Journal | None = None,
        publisher: _Publisher | None = None,
        listeners: Sequence[Callable[[Event], None]] = (),
    ) -> None:
        self.run_id = run_id
        self.step = 0
        self.epoch = 0
        self.num_parameters = 0
        self._journal = journal
        self._publisher = publisher
        self._listeners = list(listeners)

    def decision(self, decision: Decision, *, applied: bool, refused: str = "", seed_id: str = "") -> None:
        """Record the answer to a decision point."""
        self._event(
            DecisionRecord(
                self.run_id,
                self.step,
                self.epoch,
                decision,
                applied,
                refused,
                seed_id,
                self.num_parameters,
                time.time(),
            )
        )

    def transition(
        self, *, seed_id: str, site: str, blueprint: str, source: Stage, target: Stage, reason: str,
        measurements: dict[str, float],
    ) -> None:  # fmt: skip
        """Record a stage transition with its gate's measurements."""
        self._event(
            TransitionRecord(
                self.run_id, self.step, self.epoch, seed_id, site, blueprint, source, target, reason, measurements,
                self.num_parameters, time.time(),
            )
        )  # fmt: skip

    def governor(self, record: GovernorRecord) -> None:
        """Record an intervention of the governor, and announce it as an error-recovery event."""
        self._event(record)
        self.error(record.target, record.action, record.reason)

    def error(self, layer_id: str, kind: str, detail: str) -> None:
        """Publish that something went wrong and was handled."""
        self.publish(ErrorRecoveryEvent(self.run_id, self.step, layer_id, kind, detail, time.time()))

    def run(self, record: RunRecord) -> None:
        """Record a mark of the run itself."""
        self._event(record)

    def signals(self, signals: Sequence[HealthSignal]) -> None:
        """Publish the health signals of one sampled step as one message."""
        if self._publisher is not None:
            self.publish(SignalBatch.of(self.run_id, self.step, self.epoch, signals, time.time()))

    def timing(self, step_latency_ms: float, probe_latency_ms: float) -> None:
        """Publish what one sampled step and its probes took."""
        self.publish(
            KernelPerformance(self.run_id, self.step, step_latency_ms, probe_latency_ms, time.time())
        )

    def performance(self, message: ModelPerformance) -> None:
        """Publish loss, size and cost so far."""
        self.publish(message)

    def publish(self, message: Message) -> None:
        """Put a message on the bus, if there is one; never blocks."""
        if self._publisher is not None:
            self._publisher.publish(message)

    def _event(self, event: Event) -> None:
        if self._journal is not None:
            self._journal.write(event)
        self.publish(event)
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                _log.exception(
                    "a listener of growth events failed and will not be called again: %r", listener
                )
                self._listeners.remove(listener)
