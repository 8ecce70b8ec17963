"""The collector: last signals, bounded history, counts."""

from __future__ import annotations

import pytest

from esper.errors import ConfigError
from esper.messages import RunRecord
from esper.oona import Collector, Publisher, Subscriber


def test_drains_signals_and_hands_the_rest_on(make_batch) -> None:  # type: ignore[no-untyped-def]
    record = RunRecord("r", "end", 5, {}, 1.0)
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        collector = Collector(subscriber)
        assert collector.drain() == []
        assert collector.latest is None
        assert collector.last == {}
        publisher.publish(make_batch(1))
        publisher.publish(record)
        publisher.publish(make_batch(2))
        assert [message for _, message in collector.drain()] == [make_batch(1), record, make_batch(2)]
        assert (collector.num_batches, collector.num_signals) == (2, 4)
        assert collector.latest == make_batch(2)


def test_last_and_history_are_bounded(make_batch) -> None:  # type: ignore[no-untyped-def]
    collector = Collector(history=3)
    collector.add(make_batch(0, ("old", "fc")))
    for step in range(1, 3):
        collector.add(make_batch(step, ("fc",)))
    assert {key: signal.step for key, signal in collector.last.items()} == {("old", ""): 0, ("fc", ""): 2}
    collector.add(make_batch(3, ("fc",)))
    assert set(collector.last) == {("fc", "")}  # a layer not heard of in the kept history fades out
    assert [signal.step for signal in collector.history("fc")] == [1, 2, 3]
    assert collector.history("fc", "seed") == []
    assert collector.num_batches == 4
    assert repr(collector) == "Collector(4 batches, 5 signals)"


def test_history_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least 1 batch, got 0"):
        Collector(history=0)
