"""Health signals and batches for tests: a neutral signal, with the fields changed that a test is about."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from esper.messages import HealthSignal, SignalBatch

_NEUTRAL = HealthSignal(
    "fc1", "", 0, 0, 0, 1.0, 0.1, 0.0, 0.0, 4.0, 0.5, 2.0, 1e-3, 0.0, False, 0.8, 0.2, 0, 0, 0, 1.0
)


def signal(layer_id: str = "fc1", **fields: Any) -> HealthSignal:
    return msgspec.structs.replace(_NEUTRAL, layer_id=layer_id, **fields)


def batch(*signals: HealthSignal, run_id: str = "run", timestamp: float | None = None) -> SignalBatch:
    step = signals[0].step if signals else 0
    return SignalBatch.of(run_id, step, 0, list(signals), time.time() if timestamp is None else timestamp)
