"""The collector benchmark runs and reports what it promises (the targets themselves need a quiet machine)."""

from __future__ import annotations

import json

from esper.bench import collector


def test_a_short_run_gives_flat_finite_figures() -> None:
    figures = collector.run(seconds=2.0)
    assert set(collector.TARGETS) <= set(figures)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["lost"] == 0
    assert figures["signals_per_s"] > 20_000
    assert 0 < figures["ratio"] < 2
    assert 0.1 < figures["passed_fraction"] < 0.25
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] < 1000
