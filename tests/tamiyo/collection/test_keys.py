"""Series keep their numbers while somebody refers to them, and give them back when nobody does."""

from __future__ import annotations

import numpy as np
import pytest
from telemetry import signal

from esper.errors import ConfigError
from esper.tamiyo.collection import SignalFilterEngine
from esper.tamiyo.collection.keys import KeyTable, Series, TooManySeriesError


def test_a_series_keeps_its_key_and_runs_are_apart() -> None:
    keys = KeyTable()
    first = keys.of("a", "fc1")
    assert keys.of("a", "fc1", "s1") != first != keys.of("b", "fc1")
    assert keys.of("a", "fc1") == first
    assert keys.named(first) == Series("a", "fc1", "")
    assert keys.of_run("a") == {("fc1", ""): 0, ("fc1", "s1"): 1}
    assert keys.run_ids == ["a", "b"]
    assert len(keys) == 3


def test_a_table_says_whether_a_series_comes_twice() -> None:
    keys = KeyTable()
    assert keys.of_table("a", ("x", "y", "x"), ("", "", "s")).distinct
    twice = keys.of_table("a", ["x", "y", "x"], ["", "", ""])
    assert not twice.distinct
    assert twice.keys.tolist() == [0, 1, 0]
    assert keys.of_table("a", ("x",), ("",)) is keys.of_table("a", ("x",), ("",))


def test_the_least_recent_that_nobody_holds_are_given_up() -> None:
    keys = KeyTable(128)
    forgotten: list[int] = []
    keys.hold(lambda: np.array([0]))
    keys.follow(lambda given_up: forgotten.extend(given_up.tolist()))
    for index in range(128):
        keys.of("run", f"layer{index}")
    keys.of("run", "layer1")  # now layer2 and layer3 are the oldest that nobody holds
    new = keys.of("run", "new")
    assert forgotten == [2, 3]
    assert new in (2, 3)
    assert keys.named(0).layer_id == "layer0"
    assert ("layer2", "") not in keys.of_run("run")
    assert len(keys) == 127


def test_a_run_that_lost_its_last_key_is_gone() -> None:
    keys = KeyTable(1)
    keys.of("a", "x")
    keys.of("b", "x")
    assert keys.run_ids == ["b"]


def test_what_is_held_is_never_given_up() -> None:
    keys = KeyTable(4)
    keys.hold(lambda: np.arange(4))
    keys.of_table("run", "abcd", [""] * 4)
    with pytest.raises(TooManySeriesError, match="at most 4 layers and seeds at once"):
        keys.of("run", "e")
    with pytest.raises(TooManySeriesError):  # a table larger than all keys must not take its own
        KeyTable(4).of_table("run", "abcde", [""] * 5)


def test_a_filter_forgets_the_history_of_a_key_that_was_given_up() -> None:
    engine = SignalFilterEngine(keys=KeyTable(1))
    for _ in range(30):
        engine.should_process(signal("old"))
    assert engine.should_process(
        signal("new", health_score=0.1)
    )  # the first of its series, no anomaly of the old
    assert engine.history("new") == [pytest.approx(0.1, abs=1e-6)]
    assert engine.history("old") == []


def test_a_cached_table_keeps_its_series_young() -> None:
    keys = KeyTable(3)
    keys.of_table("run", ("a", "b"), ("", ""))
    keys.of("run", "c")
    keys.of_table("run", ("a", "b"), ("", ""))
    keys.of("run", "d")
    assert set(keys.of_run("run")) == {("a", ""), ("b", ""), ("d", "")}


def test_room_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_keys"):
        KeyTable(0)
