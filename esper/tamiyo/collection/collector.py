"""The health collector: reads telemetry, filters it, and keeps what decisions are made from."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Self

import numpy as np

from esper.errors import ConfigError, EsperError
from esper.messages import Message
from esper.oona import BusConfig, RunInfo, Subscriber
from esper.signal_table import SignalTable
from esper.tamiyo.collection.alerts import LOSSES, Alerts
from esper.tamiyo.collection.buffer import HealthSignalBuffer
from esper.tamiyo.collection.client import TELEMETRY, TelemetryClient
from esper.tamiyo.collection.config import CollectionConfig
from esper.tamiyo.collection.filter import SignalFilterEngine
from esper.tamiyo.collection.intake import SignalIntake
from esper.tamiyo.collection.keys import KeyTable
from esper.tamiyo.collection.ring import SignalBlock
from esper.tamiyo.collection.statistics import CollectionStatistics, CollectionStats, snapshot
from esper.tamiyo.collection.window import SignalWindow

__all__ = ["HealthCollector", "OnBatch"]

_LOG = logging.getLogger("esper.tamiyo.collection")
_LOOK_S = 0.25  # how long a closed client may go unnoticed

OnBatch = Callable[[dict[str, SignalTable]], Awaitable[None] | None]
"""Takes a processed batch: run id -> its signals, of high priority first."""


class HealthCollector:
    """Collects the health signals of one or several runs.

    Tasks on the running event loop do the work. One reads messages whenever the client's descriptor says
    that there are some, filters them by columns and puts what passes into the buffer. The next takes batches
    from the buffer, high priority first, and makes them available: to ``on_batch``, and to
    :meth:`get_recent_signals` and :meth:`get_signals_for_layer`. A third logs statistics and alerts.

    What arrives cannot stop it: messages that make no sense are refused and counted. An error in the client
    or in ``on_batch`` does: it is logged at once, and raised by :meth:`stop` and to whoever asks for signals.

    Use it from the event loop's thread. ``async with`` starts and stops it.

    Args:
        client: A subscription to the topics :data:`TELEMETRY`; it is the caller's to close, after
            :meth:`stop`. See :meth:`connect` for a collector with a subscription of its own.
        buffer_size: Signals that may wait to be processed.
        processing_batch_size: Signals to process at a time.
        config: All other settings.
        on_batch: Called with every processed batch. While it takes its time, signals wait in the buffer.

    Attributes:
        runs: Run id -> last word on each of the other topics.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        client: TelemetryClient,
        buffer_size: int = 50_000,
        processing_batch_size: int = 1000,
        *,
        config: CollectionConfig | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        if processing_batch_size < 1:
            raise ConfigError(f"expected a processing_batch_size of at least 1, got {processing_batch_size}")
        self.client = client
        self.config = config if config is not None else CollectionConfig()
        self.processing_batch_size = processing_batch_size
        self.signal_buffer = HealthSignalBuffer(buffer_size)
        self._keys = KeyTable(self.config.max_keys)
        self.filter_engine = SignalFilterEngine(
            self.config.anomaly_threshold,
            history_size=self.config.history_size,
            normal_every=self.config.normal_every,
            min_history=self.config.min_history,
            sigma_floor=self.config.sigma_floor,
            keys=self._keys,
        )
        self.statistics = CollectionStatistics(self.config.statistics_window_s, self.config.clock_tolerance_s)
        self._window = SignalWindow(self.config.window_size, self._keys)
        self._intake = SignalIntake(self.filter_engine, self.signal_buffer, self._window, self.statistics)
        self.error_recovery_integration = self._intake.error_recovery_integration
        self.runs = self._intake.runs
        self._alerts = Alerts(self.config)
        self._on_batch = on_batch
        self._owns_client = False
        self._readable = asyncio.Event()
        self._waiting = asyncio.Event()
        self._descriptor = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None

    @classmethod
    def connect(
        cls,
        targets: str | RunInfo | Iterable[str | RunInfo],
        buffer_size: int = 50_000,
        processing_batch_size: int = 1000,
        *,
        bus: BusConfig | None = None,
        config: CollectionConfig | None = None,
        on_batch: OnBatch | None = None,
    ) -> Self:
        """A collector with a subscription to the five topics, which :meth:`stop` closes.

        Args:
            targets: Where to subscribe, as :class:`Subscriber` takes it.
            buffer_size: As for the class.
            processing_batch_size: As for the class.
            bus: Settings of the subscription.
            config: As for the class.
            on_batch: As for the class.

        Raises:
            ConfigError: an address or a setting is wrong.
        """
        client = Subscriber(targets, TELEMETRY, config=bus)
        try:
            collector = cls(client, buffer_size, processing_batch_size, config=config, on_batch=on_batch)
        except BaseException:
            client.close()
            raise
        collector._owns_client = True
        return collector

    @property
    def running(self) -> bool:
        """Whether it is collecting."""
        return self._failure is None and any(not task.done() for task in self._tasks)

    async def start_intelligent_collection(self) -> None:
        """Begin to collect, in tasks of their own, and return. Without effect while it is collecting.

        Raises:
            EsperError: the client is closed.
            Exception: what ended the collection before, if nobody has been told yet.
        """
        if self.running:
            return
        await self._end()
        if self.client.closed:
            raise EsperError(
                f"expected an open subscription to collect from, got {self.client!r}; "
                "make a new collector with a new one"
            )
        self._loop = asyncio.get_running_loop()
        self._readable, self._waiting = asyncio.Event(), asyncio.Event()
        self._waiting.set()  # what an earlier collection has left
        self.statistics.began()
        self._descriptor = self.client.fileno()
        self._loop.add_reader(self._descriptor, self._readable.set)
        for work in (self._message_ingestion_loop, self._processing_loop, self._statistics_reporting_loop):
            task = self._loop.create_task(work(), name=f"health-collector{work.__name__}")
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    async def stop(self) -> None:
        """End the tasks and wait until they have; close the client of :meth:`connect`. Idempotent.

        What was kept can still be asked for; what waits in the buffer is processed when it starts again.

        Raises:
            Exception: what ended the collection earlier; once.
        """
        try:
            await self._end()
        finally:
            if self._owns_client:
                self.client.close()

    async def __aenter__(self) -> Self:
        await self.start_intelligent_collection()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def ingest(self, message: Message) -> None:
        """Take one message, as the reader does with those of the client; never raises for what is in it."""
        self._intake.take(message)
        if len(self.signal_buffer):
            self._waiting.set()

    async def get_recent_signals(self, count: int = 500, run_id: str | None = None) -> SignalTable:
        """The last ``count`` available signals of a run, in the order in which they arrived, oldest first.

        They are what the filter let through: every error, readiness and anomaly, and every tenth of the rest
        of each layer and seed; so the last 500 reach further back than the last 500 that were measured.

        Args:
            count: Signals at most.
            run_id: Of the run; may be left out while the kept signals are all of one.

        Returns:
            A sequence of :class:`HealthSignal` that is kept as columns; empty where there are none.

        Raises:
            ConfigError: ``count`` is negative, or several runs send and none was named.
            EsperError: the collection has failed.
        """
        self._check_alive()
        return self._window.recent(count, run_id)

    async def get_signals_for_layer(
        self, layer_id: str, count: int = 100, *, seed_id: str | None = None, run_id: str | None = None
    ) -> SignalTable:
        """The last available signals of one layer and its seeds, oldest first.

        Args:
            layer_id: Of the layer.
            count: Signals at most.
            seed_id: Only of this seed; ``""`` for the layer's own signals only.
            run_id: May be left out while one run only has such a layer.

        Raises:
            ConfigError: ``count`` is negative, or several runs have such a layer and none was named.
            EsperError: the collection has failed.
        """
        self._check_alive()
        return self._window.of_layer(layer_id, count, seed_id, run_id)

    def get_collection_stats(self) -> CollectionStats:
        """All counts, rates and alerts at this moment."""
        return snapshot(
            self.statistics,
            buffer=self.signal_buffer,
            client=self.client.stats,
            kept=len(self._window),
            num_runs=len(self.runs),
            num_series=len(self._keys),
            alerts=self._alerts.raised,
        )

    async def _message_ingestion_loop(self) -> None:
        poll, limit = self.client.poll, self.config.poll_messages
        while True:
            # before polling: what comes afterwards makes the descriptor readable again
            self._readable.clear()
            messages = poll(0, max_messages=limit)
            for _, message in messages:
                self.ingest(message)
            if messages:
                await asyncio.sleep(0)
            elif self.client.closed:
                raise EsperError(
                    f"expected the subscription to stay open while the collector reads from it, but "
                    f"{self.client!r} was closed: stop the collector first"
                )
            else:
                await _wait_for(self._readable, _LOOK_S)

    async def _processing_loop(self) -> None:
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while (block := self.signal_buffer.take(self.processing_batch_size)) is not None:
                self._window.add(block)
                self.statistics.became_available(block)
                if self._on_batch is not None:
                    result = self._on_batch(self._by_run(block))
                    if inspect.isawaitable(result):
                        await result
                await asyncio.sleep(0)

    async def _statistics_reporting_loop(self) -> None:
        next_report = time.monotonic() + self.config.report_interval_s
        pause_s = min(self.config.alert_interval_s, self.config.report_interval_s)
        while True:
            await asyncio.sleep(pause_s)
            stats = self.get_collection_stats()
            losses = {name: getattr(stats, name) for name in LOSSES}
            self._alerts.look(fill=stats.buffer_fill, silent_s=stats.silent_s, losses=losses)
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + self.config.report_interval_s
                _LOG.info("health collection: %s", stats)

    def _by_run(self, block: SignalBlock) -> dict[str, SignalTable]:
        owners = [self._keys.named(key).run_id for key in block.keys.tolist()]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(owners))}
        if len(numbers) == 1:
            return {owners[0]: block.table(self._keys)}
        column = np.array([numbers[owner] for owner in owners])
        return {name: block.select(column == number).table(self._keys) for name, number in numbers.items()}

    async def _end(self) -> None:
        """End the tasks, and raise what ended them earlier."""
        self._watch_no_more()
        # not the task that calls this, out of on_batch: it cannot wait for itself
        others = [task for task in self._tasks if not task.done() and task is not asyncio.current_task()]
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*others, return_exceptions=True)
        finally:  # also where this very call is cancelled: the tasks are on their way out
            self._tasks = [task for task in self._tasks if not task.done()]
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _ended(self, task: asyncio.Task[None]) -> None:
        """One task has ended; where it failed, the others end too."""
        error = None if task.cancelled() else task.exception()
        if error is None or self._failure is not None:
            return
        self._failure = error
        _LOG.error("the health collection has ended: %r", error, exc_info=error)
        self._watch_no_more()
        for other in self._tasks:
            other.cancel()

    def _watch_no_more(self) -> None:
        if self._descriptor >= 0 and self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        self._descriptor = -1

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EsperError(f"the health collection has ended: {self._failure!r}") from self._failure

    def __repr__(self) -> str:
        state = "collecting" if self.running else "stopped" if self._failure is None else "failed"
        return f"HealthCollector({self.client!r}, {state}, {self.statistics.received} signals)"


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until it is set, for a while; without the task that ``asyncio.wait_for`` would make."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
