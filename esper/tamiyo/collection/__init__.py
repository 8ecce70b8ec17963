"""Health signals on their way to decisions: read, filtered, buffered, counted, kept."""

from esper.tamiyo.collection.client import TELEMETRY, TelemetryClient
from esper.tamiyo.collection.collector import HealthCollector
from esper.tamiyo.collection.config import CollectionConfig
from esper.tamiyo.collection.filter import SignalFilterEngine
from esper.tamiyo.collection.priority import Priority
from esper.tamiyo.collection.statistics import CollectionStats

__all__ = [
    "TELEMETRY",
    "CollectionConfig",
    "CollectionStats",
    "HealthCollector",
    "Priority",
    "SignalFilterEngine",
    "TelemetryClient",
]
