"""The publisher: never blocks, counts what is lost, belongs to one process, cleans up."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from esper.errors import ConfigError, MessageError
from esper.messages import TOPICS, RunRecord
from esper.oona import BusConfig, Publisher, Subscriber, find_runs

HEALTH = TOPICS["health"]


def take(subscriber: Subscriber, count: int, timeout_s: float = 5.0) -> list[object]:
    """Read until ``count`` messages are there."""
    messages: list[object] = []
    deadline = time.monotonic() + timeout_s
    while len(messages) < count and time.monotonic() < deadline:
        messages += [message for _, message in subscriber.poll(50)]
    return messages


def test_within_a_process_a_message_is_there_at_once(make_batch) -> None:  # type: ignore[no-untyped-def]
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        for step in range(3):
            assert publisher.publish(make_batch(step))
            assert subscriber.poll() == [(HEALTH, make_batch(step))]
    assert publisher.stats.sent == 3
    assert subscriber.stats.received == 3
    assert subscriber.stats.missed == 0


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_other_transports_deliver_in_order(transport: str, make_batch) -> None:  # type: ignore[no-untyped-def]
    config = BusConfig(transport=transport)  # type: ignore[arg-type]
    with Publisher("r", config) as publisher, Subscriber(find_runs()[0], ["health"]) as subscriber:
        assert publisher.addresses[1].startswith(transport)
        assert publisher.wait_for_subscriber(HEALTH, timeout_s=5)
        batches = [make_batch(step) for step in range(50)]
        assert all([publisher.publish(batch) for batch in batches])
        assert take(subscriber, 50) == batches


def test_without_a_listener_nothing_is_encoded_or_kept(make_batch) -> None:  # type: ignore[no-untyped-def]
    with Publisher("r") as publisher:
        assert not publisher.publish(make_batch())
        with Subscriber("r", ["growth"]):
            assert not publisher.publish(make_batch())
        assert publisher.stats.unheard == 2
        assert publisher.stats.num_dropped == 0


def test_a_stalled_reader_costs_messages_not_time(make_batch) -> None:  # type: ignore[no-untyped-def]
    config = BusConfig(high_water_mark=10)
    with (
        Publisher("r", config) as publisher,
        Subscriber("r", config=config) as stalled,
        Subscriber("r", config=config) as reader,
    ):
        start = time.monotonic()
        for step in range(500):
            publisher.publish(make_batch(step))
            assert len(reader.poll()) == 1
        assert time.monotonic() - start < 5
        assert len(take(stalled, 500, timeout_s=0.3)) < 100
        publisher.publish(make_batch(500))
        take(stalled, 1)
        assert stalled.stats.received + stalled.stats.missed == 501
        assert stalled.stats.missed > 400
        assert reader.stats.missed == 0


def test_oversized_and_unencodable_messages_are_counted_and_logged_once(
    make_batch, caplog: pytest.LogCaptureFixture  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    config = BusConfig(max_message_bytes=1024)
    with Publisher("r", config) as publisher, Subscriber("r") as subscriber:
        with caplog.at_level(logging.WARNING, "esper.oona"):
            for _ in range(3):
                assert not publisher.publish(make_batch(layers=("layer",) * 100))
                assert not publisher.publish(RunRecord("r", "note", 1, {"object": object()}, 1.0))
        assert publisher.stats.dropped == {"oversized": 3, "unencodable": 3}
        assert [record.getMessage().count("not sent") for record in caplog.records] == [1, 1]
        assert publisher.publish(make_batch())
        assert publisher.publish(make_batch())
        assert len(subscriber.poll()) == 2
        with pytest.raises(MessageError, match="got str"):
            publisher.publish("hello")  # type: ignore[arg-type]


def test_close_is_idempotent_and_final(make_batch, runtime_dir: Path) -> None:  # type: ignore[no-untyped-def]
    publisher = Publisher("r").open()
    assert len(list(runtime_dir.iterdir())) == 2
    publisher.close()
    publisher.close()
    assert list(runtime_dir.iterdir()) == []
    assert not publisher.publish(make_batch())
    assert publisher.stats.dropped == {"closed": 1}
    assert publisher.addresses == ()


@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_a_closed_address_can_be_bound_again_at_once(transport: str, runtime_dir: Path) -> None:
    address = {"inproc": "", "ipc": f"ipc://{runtime_dir}/s", "tcp": ""}[transport]
    with Publisher("r", BusConfig(transport=transport, address=address)) as first:  # type: ignore[arg-type]
        address = "" if transport == "inproc" else first.addresses[1]
    for _ in range(20):
        with Publisher("r", BusConfig(transport=transport, address=address)) as again:  # type: ignore[arg-type]
            assert address in ("", again.addresses[1])


def test_a_forgotten_publisher_leaves_nothing_behind(runtime_dir: Path) -> None:
    Publisher("r").open()
    assert list(runtime_dir.iterdir()) == []


def test_an_address_in_use_is_said_before_training(runtime_dir: Path) -> None:
    address = f"ipc://{runtime_dir}/s"
    with Publisher("r"), pytest.raises(ConfigError, match="close the earlier one of this run"):
        Publisher("r").open()
    with Publisher("a", BusConfig(transport="tcp")) as first:
        config = BusConfig(transport="tcp", address=first.addresses[1])
        with pytest.raises(ConfigError, match="choose another address"):
            Publisher("b", config).open()
    with pytest.raises(ConfigError, match="expected to bind ipc:///no/such"):
        Publisher("c", BusConfig(transport="ipc", address="ipc:///no/such/dir/s")).open()
    with Publisher("d", BusConfig(transport="ipc", address=address)) as publisher:
        assert publisher.addresses[1] == address
        with pytest.raises(ConfigError, match="Address already in use; choose another"):
            Publisher("e", BusConfig(transport="ipc", address=address)).open()
    assert not (runtime_dir / "s").exists()


def test_inproc_goes_on_where_no_socket_file_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make_batch  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    monkeypatch.setenv("ESPER_RUNTIME_DIR", "/tmp/" + "deep/" * 30)
    with (
        caplog.at_level(logging.WARNING, "esper.oona"),
        Publisher("r") as publisher,
        Subscriber("r") as subscriber,
    ):
        publisher.publish(make_batch())
        assert len(subscriber.poll()) == 1
    assert "cannot be watched from another process" in caplog.text
    assert "ESPER_RUNTIME_DIR" in caplog.text
    with pytest.raises(ConfigError, match="too deep for a socket path"):
        Publisher("r", BusConfig(transport="ipc")).open()


def test_not_announced_means_no_files(runtime_dir: Path) -> None:
    with Publisher("r", BusConfig(announce=False)) as publisher:
        assert publisher.addresses == ("inproc://esper/r/telemetry",)
        assert list(runtime_dir.iterdir()) == []
    with Publisher("r", BusConfig(transport="ipc", announce=False)) as publisher:
        assert [f"ipc://{path}" for path in runtime_dir.iterdir()] == [publisher.addresses[1]]
        assert find_runs() == []
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_travels_without_its_socket(copier, make_batch) -> None:  # type: ignore[no-untyped-def]
    config = BusConfig(high_water_mark=7)
    with Publisher("r", config, run_dir="/tmp/run") as publisher:
        twin = copier(publisher)
        assert (twin.run_id, twin.config, twin.run_dir) == ("r", config, "/tmp/run")
        assert twin.addresses == ()
        publisher.close()
        with twin, Subscriber("r") as subscriber:
            assert twin.publish(make_batch())
            assert len(subscriber.poll()) == 1


@pytest.mark.parametrize("run_id", ["", "x" * 129, "a\nb"])
def test_run_ids_must_be_printable_and_short(run_id: str) -> None:
    with pytest.raises(ConfigError, match="1 to 128 printable"):
        Publisher(run_id)


def _publish_in_child(publisher: Publisher, batch: object, answer: Connection) -> None:
    sent = publisher.publish(batch)  # type: ignore[arg-type]
    dropped = dict(publisher.stats.dropped)
    publisher.close()
    answer.send((sent, dropped))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_silent_and_leaves_the_parents_socket_alone(make_batch) -> None:  # type: ignore[no-untyped-def]
    context = multiprocessing.get_context("fork")
    with Publisher("r") as publisher, Subscriber(find_runs()[0]) as subscriber:
        assert publisher.wait_for_subscriber(HEALTH, timeout_s=5)
        answer, remote = context.Pipe()
        child = context.Process(target=_publish_in_child, args=(publisher, make_batch(1), remote))
        child.start()
        assert answer.recv() == (False, {"forked": 1})
        child.join(10)
        assert child.exitcode == 0
        assert len(find_runs()) == 1  # the child's close() did not withdraw the run
        assert publisher.publish(make_batch(2))
        assert [message.step for message in take(subscriber, 1)] == [2]  # type: ignore[attr-defined]


def _publish_in_spawned(publisher: Publisher, batch: object, answer: Connection) -> None:
    with publisher:
        answer.send((os.getpid(), publisher.addresses))
        publisher.wait_for_subscriber(HEALTH, timeout_s=20)
        publisher.publish(batch)  # type: ignore[arg-type]


def test_a_spawned_child_opens_its_own_and_closing_delivers_what_waits(make_batch) -> None:  # type: ignore[no-untyped-def]
    context = multiprocessing.get_context("spawn")
    with Publisher("r") as publisher:
        answer, remote = context.Pipe()
        child = context.Process(target=_publish_in_spawned, args=(publisher, make_batch(3), remote))
        child.start()
        pid, addresses = answer.recv()
        assert {run.pid for run in find_runs()} == {os.getpid(), pid}
        with Subscriber(addresses[1]) as subscriber:
            assert take(subscriber, 1) == [make_batch(3)]
        child.join(10)
        assert [run.pid for run in find_runs()] == [os.getpid()]
