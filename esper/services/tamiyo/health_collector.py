"""The document's name for :class:`esper.tamiyo.collection.HealthCollector`."""

from __future__ import annotations

from esper.tamiyo.collection import CollectionConfig, HealthCollector, SignalFilterEngine, TelemetryClient
from esper.tamiyo.collection.buffer import HealthSignalBuffer
from esper.tamiyo.collection.collector import OnBatch
from esper.tamiyo.collection.statistics import CollectionStatistics

__all__ = ["CollectionStatistics", "HealthSignalBuffer", "ProductionHealthCollector", "SignalFilterEngine"]


class ProductionHealthCollector(HealthCollector):
    """Collects the health signals of live runs.

    Args:
        oona_client: A subscription to telemetry, such as :attr:`esper.services.tamiyo.TamiyoService.oona_client`.
        buffer_size: Signals that may wait to be processed.
        processing_batch_size: Signals to process at a time.
        config: All other settings.
        on_batch: Called with every processed batch.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self,
        oona_client: TelemetryClient,
        buffer_size: int = 50_000,
        processing_batch_size: int = 1000,
        *,
        config: CollectionConfig | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        super().__init__(oona_client, buffer_size, processing_batch_size, config=config, on_batch=on_batch)

    @property
    def oona_client(self) -> TelemetryClient:
        """What it reads from."""
        return self.client
