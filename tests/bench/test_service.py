"""The service's benchmark, small: every figure is there, and every request was answered."""

from __future__ import annotations

import math

from esper.bench.service import TARGETS, run


def test_a_short_run_measures_what_it_says() -> None:
    figures = run(runs=3, seconds=1.0, layers=4, interval_s=0.25)
    assert set(TARGETS) <= set(figures)
    assert figures["decisions"] == 12
    assert figures["unanswered"] == 0
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]
    assert figures["per_pass"] >= 1
    assert math.isnan(figures["cpu_ms"]) or figures["cpu_ms"] > 0
