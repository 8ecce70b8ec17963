"""The subscriber: refuses what is wrong, counts what is missing."""

from __future__ import annotations

import logging
import select
import struct
from collections.abc import Iterator

import pytest
import zmq

from esper.errors import ConfigError
from esper.messages import SCHEMA_VERSION, TOPICS, RunRecord
from esper.oona import BusConfig, Publisher, RunInfo, Subscriber, encode

RECORD = RunRecord("r", "note", 1, {}, 1.0)
ADDRESS = "inproc://test/subscriber"


@pytest.fixture
def sender() -> Iterator[zmq.Socket[bytes]]:
    """A bare socket that sends what a publisher would not."""
    with zmq.Context.instance().socket(zmq.PUB) as socket:
        socket.linger = 0
        socket.bind(ADDRESS)
        yield socket
        socket.unbind(ADDRESS)  # at once; closing does it some time later


def test_what_is_refused_is_counted_logged_once_and_dropped(
    sender: zmq.Socket[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    old = bytearray(encode(RECORD))
    struct.pack_into("!H", old, old.index(b"ESPR") + 4, SCHEMA_VERSION - 1)
    foreign = encode(RECORD).replace(b"telemetry.growth.events", b"telemetry.weather.report")
    wrong = [b"\xff\x00garbage", b"", bytes(old), foreign, bytes(10_000)]
    config = BusConfig(max_message_bytes=5000)
    with (
        Subscriber(ADDRESS, config=config) as subscriber,
        caplog.at_level(logging.WARNING, "esper.oona"),
    ):
        for data in [*wrong, *wrong, encode(RECORD)]:
            sender.send(data)
        assert subscriber.poll(1000) == [(TOPICS["growth"], RECORD)]
        assert subscriber.stats.rejected == {"malformed": 4, "version": 2, "unknown": 2, "oversized": 2}
        assert subscriber.stats.num_rejected == 10
        assert subscriber.stats.received == 1
    assert len(caplog.records) == 4
    assert "upgrade esper at the sender" in caplog.text


def test_gaps_are_counted_by_publisher_and_topic(sender: zmq.Socket[bytes]) -> None:
    with Subscriber(ADDRESS) as subscriber:
        for publisher, sequence in [
            (b"a" * 8, 5),
            (b"b" * 8, 0),
            (b"a" * 8, 6),
            (b"a" * 8, 9),
            (b"b" * 8, 1),
        ]:
            sender.send(encode(RECORD, publisher=publisher, sequence=sequence))
        assert len(subscriber.poll(1000)) == 5
        assert subscriber.stats.missed == 2  # 7 and 8 of a; what came before its first is not a gap
        sender.send(encode(RECORD, publisher=b"a" * 8, sequence=3))  # a repeat is no gap, then or later
        sender.send(encode(RECORD, publisher=b"a" * 8, sequence=10))
        assert len(subscriber.poll(1000)) == 2
        assert subscriber.stats.missed == 2


def test_forged_senders_do_not_fill_the_memory(sender: zmq.Socket[bytes]) -> None:
    with Subscriber(ADDRESS, config=BusConfig(high_water_mark=5000)) as subscriber:
        for number in range(3000):
            sender.send(encode(RECORD, publisher=number.to_bytes(8, "big")))
            subscriber.poll()
        assert subscriber.stats.received == 3000
        assert len(subscriber._next) == 1024


def test_topics_choose(make_batch) -> None:  # type: ignore[no-untyped-def]
    with Publisher("r") as publisher, Subscriber("r", ["growth"]) as subscriber:
        publisher.publish(make_batch())
        publisher.publish(RECORD)
        assert subscriber.poll() == [(TOPICS["growth"], RECORD)]


def test_several_publishers_and_a_bounded_poll(make_batch) -> None:  # type: ignore[no-untyped-def]
    with Publisher("a") as first, Publisher("b") as second, Subscriber(["a", "b"]) as subscriber:
        for step in range(30):
            first.publish(make_batch(step, run_id="a"))
            second.publish(make_batch(step, run_id="b"))
        sizes = [len(subscriber.poll()) for _ in range(3)]
        assert sizes == [32, 28, 0]
        assert subscriber.stats.missed == 0


def test_iterating_ends_with_close(make_batch) -> None:  # type: ignore[no-untyped-def]
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        for step in range(3):
            publisher.publish(make_batch(step))
        steps = []
        for _, message in subscriber:
            steps.append(message.step)  # type: ignore[union-attr]
            if len(steps) == 3:
                subscriber.close()
        assert steps == [0, 1, 2]
        assert subscriber.closed
        assert subscriber.poll(1000) == []


def test_a_run_without_telemetry_cannot_be_subscribed_to() -> None:
    with pytest.raises(ConfigError, match="announces none"):
        Subscriber(RunInfo(run_id="r", pid=1, started=0.0))
    with pytest.raises(ConfigError, match="begin with ipc:// or tcp://"):
        Subscriber("udp://127.0.0.1:1")


def test_its_descriptor_says_when_there_is_something_to_read(sender: zmq.Socket[bytes]) -> None:
    with Subscriber(ADDRESS) as subscriber:
        poller = select.poll()
        poller.register(subscriber.fileno(), select.POLLIN)
        while subscriber.poll(0) or poller.poll(50):  # until the connection has settled
            pass
        sender.send(encode(RECORD))
        assert poller.poll(2000)
        assert subscriber.poll(0) == [(TOPICS["growth"], RECORD)]
        assert subscriber.poll(0) == []
        assert not poller.poll(50)
    with pytest.raises(ValueError, match="closed"):
        subscriber.fileno()
