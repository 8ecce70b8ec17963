"""The bus benchmark runs and reports what it promises (the targets themselves need a quiet machine)."""

from __future__ import annotations

import json

from esper.bench import bus


def test_a_short_run_gives_flat_finite_figures() -> None:
    figures = bus.run(seconds=1.0)
    assert set(bus.TARGETS) <= set(figures)
    assert json.loads(json.dumps(figures)) == figures
    for transport in ("ipc", "tcp"):
        assert figures[f"{transport}_missed"] == 0
        assert figures[f"{transport}_signals_per_s"] > 50_000
        assert 0 < figures[f"{transport}_ratio"] < 2
        assert 0 < figures[f"{transport}_p50_ms"] <= figures[f"{transport}_p99_ms"] < 1000


def test_targets_name_a_direction_and_a_bound() -> None:
    assert bus.TITLE
    assert all(direction in (">=", "<=") and bound > 0 for direction, bound in bus.TARGETS.values())
