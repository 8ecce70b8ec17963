"""The filter: what passes, for what, and that a table at once says the same as one signal after another."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry import signal

from esper.errors import ConfigError, MessageError
from esper.signal_table import SignalTable
from esper.tamiyo.collection import Priority, SignalFilterEngine
from esper.tamiyo.collection.keys import KeyTable


def test_errors_and_readiness_always_pass() -> None:
    engine = SignalFilterEngine()
    assert all(engine.priority(signal(error_count=1, health_score=0.0)) is Priority.ERROR for _ in range(300))
    assert all(engine.priority(signal(is_ready_for_transition=True)) is Priority.READY for _ in range(300))
    assert engine.priority(signal(error_count=1, is_ready_for_transition=True)) is Priority.ERROR


def test_thinning_goes_on_after_the_history_is_full() -> None:
    """``len(history) % 10`` stays 0 from the hundredth signal on; then everything would pass."""
    engine = SignalFilterEngine()
    passed = [index for index in range(1000) if engine.should_process(signal())]
    assert passed == list(range(0, 1000, 10))
    assert len(engine.history("fc1")) == 100


def test_each_series_of_each_run_is_thinned_by_itself() -> None:
    engine = SignalFilterEngine()
    for owner in ({"seed_id": ""}, {"seed_id": "s1"}):
        for run_id in ("a", "b"):
            assert engine.should_process(signal(**owner), run_id)
            assert not any(engine.should_process(signal(**owner), run_id) for _ in range(9))
            assert engine.should_process(signal(**owner), run_id)


def test_an_anomaly_lies_beyond_two_sigma_of_its_own_history() -> None:
    engine = SignalFilterEngine()
    scores = [0.5 + 0.1 * (-1) ** index for index in range(40)]  # mean .5, sigma .1
    for score in scores:
        engine.should_process(signal(health_score=score))
    other = SignalFilterEngine(keys=KeyTable())
    for score in scores:
        other.should_process(signal(health_score=score))
    assert engine.priority(signal(health_score=0.69)) is not Priority.ANOMALY
    assert other.priority(signal(health_score=0.71)) is Priority.ANOMALY


def test_a_flat_history_has_a_floor() -> None:
    engine = SignalFilterEngine(sigma_floor=0.01)
    for _ in range(50):
        engine.should_process(signal(health_score=0.8))
    assert engine.priority(signal(health_score=0.8000001)) is not Priority.ANOMALY
    assert engine.priority(signal(health_score=0.815)) is not Priority.ANOMALY
    assert engine.priority(signal(health_score=0.83)) is Priority.ANOMALY


def test_nothing_is_an_anomaly_before_there_is_a_history() -> None:
    engine = SignalFilterEngine(min_history=10)
    for index in range(10):
        assert engine.priority(signal(health_score=index % 2)) is not Priority.ANOMALY


def test_signals_with_errors_stay_out_of_the_history() -> None:
    engine = SignalFilterEngine()
    for _ in range(20):
        engine.should_process(signal(health_score=0.9))
    for _ in range(50):
        engine.should_process(signal(health_score=0.0, error_count=3))
    assert len(engine.history("fc1")) == 20
    assert engine.priority(signal(health_score=0.2)) is Priority.ANOMALY


def test_a_new_level_becomes_the_normal_one() -> None:
    engine = SignalFilterEngine()
    for _ in range(100):
        engine.should_process(signal(health_score=0.9))
    late = [engine.priority(signal(health_score=0.4)) for _ in range(100)][-20:]
    assert Priority.ANOMALY not in late


def test_sums_stay_exact_however_long_it_runs() -> None:
    engine = SignalFilterEngine(history_size=20)
    draw = random.Random(0)
    for _ in range(20_000):
        engine.should_process(signal(health_score=draw.random()))
    kept = np.array(engine.history("fc1")) * 2**20
    assert len(kept) == 20
    assert engine._sums[0] == kept.sum()
    assert engine._squares[0] == (kept.astype(np.int64) ** 2).sum()


_scores = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0), st.floats(0.49, 0.51))
_signals = st.builds(
    signal,
    layer_id=st.sampled_from("abc"),
    seed_id=st.sampled_from(["", "s1"]),
    health_score=_scores,
    error_count=st.sampled_from([0, 0, 0, 0, 1]),
    is_ready_for_transition=st.sampled_from([False, False, False, True]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(_signals, max_size=8), max_size=40), st.floats(0.3, 4.0), st.integers(2, 12))
def test_a_table_at_once_agrees_with_one_signal_after_another(tables, threshold, size) -> None:  # type: ignore[no-untyped-def]
    def engine() -> SignalFilterEngine:
        return SignalFilterEngine(threshold, history_size=size, normal_every=3, min_history=2)

    by_table, one_by_one = engine(), engine()
    for signals in tables:
        table = SignalTable.of(signals)
        together = by_table.priorities(table, "run").tolist()
        assert together == [one_by_one.priority(each, "run") for each in signals]
    for layer_id in "abc":
        assert by_table.history(layer_id, run_id="run") == one_by_one.history(layer_id, run_id="run")


def test_a_long_stream_agrees_too() -> None:
    """The documented sizes, past the point at which histories are full, with every series once a table."""
    draw = random.Random(1)
    by_table, one_by_one = SignalFilterEngine(), SignalFilterEngine()
    kinds = set()
    for _ in range(300):
        signals = [
            signal(
                f"layer{index}",
                health_score=min(1.0, max(0.0, draw.gauss(0.6, 0.05 * index))),
                error_count=draw.random() < 0.01,
                is_ready_for_transition=draw.random() < 0.02,
            )
            for index in range(8)
        ]
        together = by_table.priorities(SignalTable.of(signals)).tolist()
        assert together == [one_by_one.priority(each) for each in signals]
        kinds.update(together)
    assert kinds == set(Priority)


def test_a_score_that_cannot_be_is_refused_and_not_remembered() -> None:
    engine = SignalFilterEngine()
    for score in (math.nan, -0.1, 1.1, math.inf):
        with pytest.raises(MessageError, match=r"expected health_score in \[0, 1\]"):
            engine.should_process(signal(health_score=score))
        with pytest.raises(MessageError, match="layer 'fc2'"):
            engine.priorities(SignalTable.of([signal(), signal("fc2", health_score=score)]))
    assert engine.history("fc1") == engine.history("fc2") == []
    assert engine.priorities(SignalTable.of([])).tolist() == []


def test_more_series_than_the_first_arrays_hold() -> None:
    engine = SignalFilterEngine()
    table = SignalTable.of([signal(f"layer{index}") for index in range(1000)])
    assert set(engine.priorities(table).tolist()) == {Priority.NORMAL}
    assert set(engine.priorities(table).tolist()) == {Priority.THINNED}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"anomaly_threshold": 0.0}, "anomaly_threshold"),
        ({"anomaly_threshold": math.nan}, "anomaly_threshold"),
        ({"history_size": 1}, "history_size"),
        ({"history_size": 5000}, "history_size"),
        ({"min_history": 101}, "min_history"),
        ({"normal_every": 0}, "normal_every"),
        ({"sigma_floor": 0.0}, "sigma_floor"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SignalFilterEngine(**options)  # type: ignore[arg-type]
