"""From a message to the buffer: validate, count, filter, and keep the runs apart."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from esper.errors import MessageError
from esper.messages import (
    CacheHitRates,
    ErrorRecoveryEvent,
    KernelPerformance,
    Message,
    ModelPerformance,
    SignalBatch,
)
from esper.signal_table import SignalTable
from esper.tamiyo.collection.buffer import HealthSignalBuffer
from esper.tamiyo.collection.filter import SignalFilterEngine
from esper.tamiyo.collection.keys import TooManySeriesError
from esper.tamiyo.collection.priority import Priority
from esper.tamiyo.collection.recovery import ErrorRecoveryIntegration
from esper.tamiyo.collection.ring import SignalBlock
from esper.tamiyo.collection.runs import RunStatuses
from esper.tamiyo.collection.statistics import CollectionStatistics
from esper.tamiyo.collection.window import SignalWindow

__all__ = ["SignalIntake"]

_LOG = logging.getLogger("esper.tamiyo.collection")
_MAX_RUN_ID = 128  # as for whoever publishes
_USEFUL = (SignalBatch, ErrorRecoveryEvent, ModelPerformance, KernelPerformance, CacheHitRates)


class SignalIntake:
    """Takes messages, one at a time, and never raises for what is in them.

    Args:
        filter_engine: Says what passes; its table of series is used for all that follows.
        buffer: Where it goes.
        window: Where the last signal of a layer is looked up that something went wrong in.
        statistics: Where it is counted.
    """

    def __init__(
        self,
        filter_engine: SignalFilterEngine,
        buffer: HealthSignalBuffer,
        window: SignalWindow,
        statistics: CollectionStatistics,
    ) -> None:
        self.runs = RunStatuses()
        self.error_recovery_integration = ErrorRecoveryIntegration()
        self._filter = filter_engine
        self._keys = filter_engine.keys
        self._buffer = buffer
        self._window = window
        self._statistics = statistics
        self._num_arrived = 0
        self._keys.hold(buffer.keys_in_use)

    def take(self, message: Message) -> None:
        """Take one message; types that are of no use here are counted and left."""
        self._statistics.messages += 1
        if not isinstance(message, _USEFUL):
            self._statistics.ignored += 1
        elif why := _what_is_wrong(message):
            self._refuse(why)
        elif isinstance(message, SignalBatch):
            self._take_signals(message)
        elif isinstance(message, ErrorRecoveryEvent):
            self._take_error(message)
        elif isinstance(message, ModelPerformance):
            self.runs.heard(message.run_id).performance = message
        elif isinstance(message, KernelPerformance):
            self.runs.heard(message.run_id).kernel = message
        else:
            self.runs.heard(message.run_id).cache = message

    def _take_signals(self, batch: SignalBatch) -> None:
        try:
            table = batch.table  # a batch that did not come over the bus is read here for the first time
        except (MessageError, TypeError) as error:  # TypeError: ids or columns that are no bytes
            self._refuse(str(error))
            return
        status = self.runs.heard(batch.run_id)
        status.num_signals += len(table)
        status.step = max(status.step, batch.step)
        self._statistics.signals_came(len(table))
        try:
            keys = self._keys.of_table(batch.run_id, table.layer_ids, table.seed_ids)
        except TooManySeriesError:
            self._statistics.unidentified += len(table)  # an alert says so
            return
        self._pass_on(table, self._filter.priorities(table, keys=keys), keys.keys, batch.timestamp)

    def _take_error(self, event: ErrorRecoveryEvent) -> None:
        self.runs.heard(event.run_id).count_error(event)
        signal = self.error_recovery_integration.signal(
            event,
            self._keys.of_run(event.run_id).keys(),
            lambda layer_id, seed_id: self._window.last(event.run_id, layer_id, seed_id),
        )
        if signal is None:
            return
        self._statistics.recovered += 1
        try:
            key = self._keys.of(event.run_id, signal.layer_id, signal.seed_id)
        except TooManySeriesError:
            self._statistics.unidentified += 1
            return
        # past the filter: it is no measurement, and the history is of measurements
        priorities = np.array([int(Priority.ERROR)])
        self._pass_on(SignalTable.of([signal]), priorities, np.array([key]), event.timestamp)

    def _pass_on(
        self, table: SignalTable, priorities: NDArray[np.int64], keys: NDArray[np.int64], published: float
    ) -> None:
        self._statistics.filtered(priorities)
        block = SignalBlock.of(table, keys, priorities, published=published, first=self._num_arrived)
        self._num_arrived += len(table)
        self._buffer.add(block)

    def _refuse(self, why: str) -> None:
        self._statistics.malformed += 1
        if self._statistics.malformed == 1:
            _LOG.warning("refused a message: %s; further ones are counted without a line", why)


def _what_is_wrong(
    message: SignalBatch | ErrorRecoveryEvent | ModelPerformance | KernelPerformance | CacheHitRates,
) -> str:
    """Why a message is none, or nothing: the bus has looked at types, but not every client is the bus."""
    run_id, step, timestamp = message.run_id, message.step, message.timestamp
    if not (isinstance(run_id, str) and 0 < len(run_id) <= _MAX_RUN_ID):
        return f"expected a run id of 1 to {_MAX_RUN_ID} characters, got {str(run_id)[:200]!r}"
    if not (isinstance(step, int) and 0 <= step < 2**64):
        return f"expected a step of at least 0, got {step!r} of run {run_id!r}"
    if not isinstance(timestamp, float | int):
        return f"expected a timestamp in seconds, got {timestamp!r} of run {run_id!r}"
    if isinstance(message, ErrorRecoveryEvent) and not isinstance(message.layer_id, str):
        return f"expected the name of a layer or nothing, got {message.layer_id!r} of run {run_id!r}"
    return ""
