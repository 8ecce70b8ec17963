"""Rates and percentiles over a sliding window; alerts that are said once."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from esper.errors import ConfigError
from esper.tamiyo.collection.alerts import LOSSES, Alerts
from esper.tamiyo.collection.config import CollectionConfig
from esper.tamiyo.collection.latency import SlidingWindow
from esper.tamiyo.collection.statistics import CollectionStats


def test_the_rate_is_of_the_window_and_not_of_all_time() -> None:
    window = SlidingWindow(10.0, now=100.0)
    assert window.rate(100.0) == 0.0
    for tick in range(1000):
        window.add_received(10, 100.0 + tick * 0.05)  # 200 a second for 50 s
    assert window.rate(150.0) == pytest.approx(200.0, rel=0.01)
    assert window.rate(155.0) == pytest.approx(100.0, rel=0.02)  # half of the window lies in the silence
    assert window.rate(161.0) == 0.0
    assert window.rate(10_000.0) == 0.0


def test_a_young_window_divides_by_its_age() -> None:
    window = SlidingWindow(10.0, now=0.0)
    window.add_received(50, 0.4)
    assert window.rate(0.5) == pytest.approx(100.0)


def test_percentiles_are_within_a_bin_of_numpys_and_never_too_low() -> None:
    latencies = np.random.default_rng(0).lognormal(-7, 1.5, 5000)
    window = SlidingWindow(10.0, now=0.0)
    for part in np.split(latencies, 50):
        window.add_latencies(part, 1.0)
    for fraction in (0.5, 0.95, 0.99):
        exact = 1000 * float(np.quantile(latencies, fraction, method="inverted_cdf"))
        assert exact <= window.latency_ms(fraction, 1.0) <= 1.05 * exact
    assert math.isnan(window.latency_ms(0.5, 20.0))  # they have left the window


def test_latencies_beyond_the_scale_are_counted_at_its_ends() -> None:
    window = SlidingWindow(10.0, now=0.0)
    window.add_latencies(np.array([-0.5, 0.0, 1e-9]), 0.0)
    assert window.latency_ms(0.99, 0.0) <= 1e-3
    window.add_latencies(np.array([1e6] * 9), 0.0)
    assert window.latency_ms(0.99, 0.0) == math.inf


@pytest.mark.parametrize("window_s", [0.0, -1.0, math.nan, math.inf])
def test_a_window_has_a_length(window_s: float) -> None:
    with pytest.raises(ConfigError, match="more than 0 s"):
        SlidingWindow(window_s, 0.0)


def test_an_alert_is_said_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    none = dict.fromkeys(LOSSES, 0)
    alerts = Alerts(CollectionConfig(silence_s=5.0))
    with caplog.at_level(logging.INFO, "esper.tamiyo.collection"):
        alerts.look(fill=0.5, silent_s=1.0, losses=none)
        assert alerts.raised == {}
        assert not caplog.records
        for _ in range(3):
            alerts.look(fill=0.95, silent_s=6.0, losses={**none, "dropped_high": 7})
        # a loss is told while it goes on: nothing new was lost at the second and third look
        assert set(alerts.raised) == {"buffer", "silence"}
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 3 + ["INFO"]
        assert "the buffer is 95 % full (limit 90 %)" in caplog.text
        assert "no health signal for 6 s (limit 5 s)" in caplog.text
        assert "7 more signals of high priority dropped from a full buffer (7 in all)" in caplog.text
        alerts.look(fill=0.0, silent_s=0.0, losses={**none, "dropped_high": 7})
        assert alerts.raised == {}


def test_every_loss_is_a_count_of_the_statistics() -> None:
    assert set(LOSSES) <= set(CollectionStats.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window_size": 0}, "window_size"),
        ({"max_keys": True}, "max_keys"),
        ({"poll_messages": 2.5}, "poll_messages"),
        ({"report_interval_s": 0}, "report_interval_s"),
        ({"silence_s": math.nan}, "silence_s"),
        ({"alert_fill": 1.5}, "alert_fill"),
        ({"clock_tolerance_s": -1.0}, "clock_tolerance_s"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CollectionConfig(**options)  # type: ignore[arg-type]
