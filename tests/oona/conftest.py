"""What the bus tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.messages import HealthSignal, SignalBatch


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, with a path short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="esper-test-"))
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(directory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def make_signal(layer_id: str = "net.fc1", seed_id: str = "", *, step: int = 0) -> HealthSignal:
    return HealthSignal(
        layer_id=layer_id, seed_id=seed_id, chunk_id=0, epoch=1, step=step, activation_variance=0.5,
        dead_neuron_ratio=0.25, dormancy=0.125, avg_correlation=0.5, effective_rank=3.0, gradient_norm=0.01,
        gradient_snr=2.0, update_ratio=1e-3, expressivity=0.0, is_ready_for_transition=False,
        health_score=0.75, execution_latency=0.2, error_count=0, active_seeds=0, total_seeds=0,
        timestamp=float(step),
    )  # fmt: skip


@pytest.fixture
def make_batch():  # type: ignore[no-untyped-def]
    """A function that makes a batch of the given step and layers."""

    def make(
        step: int = 0, layers: tuple[str, ...] = ("net.fc1", "net.fc2"), run_id: str = "r"
    ) -> SignalBatch:
        signals = [make_signal(layer, step=step) for layer in layers]
        return SignalBatch.of(run_id, step, 1, signals, float(step))

    return make
