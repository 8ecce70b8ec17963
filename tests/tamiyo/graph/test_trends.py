"""Trends of health over a window, and layers in trouble with the reason in words."""

from __future__ import annotations

import random

import numpy as np
import pytest
from graph_states import signal

from esper.tamiyo.graph.trends import SignalWindow, problems


def test_slope_mean_and_spread_are_those_of_each_layers_own_signals() -> None:
    health = {"a": [0.9, 0.8, 0.7, 0.6], "b": [0.5, 0.5]}
    signals = [signal(name, 10 * i, health_score=h) for name in health for i, h in enumerate(health[name])]
    random.Random(0).shuffle(signals)  # a collector gives them by priority
    window = SignalWindow([*signals, signal("a", 5, "s0", health_score=0.0)], ["a", "b", "c"], 100)
    assert window.count.tolist() == [4, 2, 0]
    np.testing.assert_allclose(window.mean_health, [0.75, 0.5, 0.0])
    np.testing.assert_allclose(window.slope, [np.polyfit(range(4), health["a"], 1)[0], 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(window.spread, [np.std(health["a"]), 0.0, 0.0], atol=1e-12)
    assert window.trends() == pytest.approx({"a": -0.1, "b": 0.0}, abs=1e-12)
    assert window.last("health_score").tolist() == [0.6, 0.5, 0.0]


def test_only_the_last_signals_count() -> None:
    signals = [signal("a", i, health_score=0.1 if i < 50 else 0.9) for i in range(60)]
    assert SignalWindow(signals, ["a"], 10).mean_health[0] == pytest.approx(0.9)
    assert SignalWindow(signals, ["a"], 100).mean_health[0] == pytest.approx((5 + 9) / 60)


def of(*fields: dict[str, float]) -> dict[str, str]:
    return problems(SignalWindow([signal("a", i, **f) for i, f in enumerate(fields)], ["a", "b"], 100))


def test_each_kind_of_trouble_is_told_in_words() -> None:
    assert of({}, {}) == {}
    assert of({"health_score": 0.2}, {"health_score": 0.3}) == {"a": "its mean health is 0.25, under 0.3"}
    assert of({"error_count": 2}, {"error_count": 1}) == {"a": "3 errors in 2 sampled steps"}
    falling = [{"health_score": 0.9 - 0.1 * i} for i in range(6)]
    assert of(*falling) == {"a": "its health falls by 0.1 a sampled step"}
    assert of(*falling[:3]) == {}  # too few to believe a slope
    slow = [{"execution_latency": 2.0}] * 5 + [{"execution_latency": 8.0}]
    assert of(*slow) == {"a": "it takes 4.0 times as long as before"}
    assert of(*[{"execution_latency": 2.0 * i} for i in (0, 0, 0, 0, 0, 1)]) == {}  # nothing to compare with
    both = of({"health_score": 0.0, "error_count": 1})["a"]
    assert both.startswith("its mean health is 0.00") and both.endswith("1 errors in 1 sampled steps")  # noqa: PT018


def test_no_signals_and_no_layers_give_an_empty_window() -> None:
    assert SignalWindow([], ["a"], 5).trends() == {}
    assert problems(SignalWindow([signal("a")], [], 5)) == {}
