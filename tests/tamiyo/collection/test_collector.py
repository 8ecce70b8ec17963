"""The collector over real sockets: what comes is filtered and kept, and nothing is left behind when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from telemetry import batch, signal

from esper.errors import ConfigError, EsperError
from esper.messages import (
    TOPICS,
    CacheHitRates,
    ErrorRecoveryEvent,
    HealthSignal,
    KernelPerformance,
    ModelPerformance,
    RunRecord,
    SignalBatch,
)
from esper.oona import BusConfig, Publisher, Subscriber
from esper.signal_table import SignalTable
from esper.tamiyo.collection import TELEMETRY, CollectionConfig, HealthCollector
from esper.tamiyo.collection.collector import OnBatch

QUIET = CollectionConfig(normal_every=1)
"""Everything passes."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def collecting(
    *run_ids: str,
    config: CollectionConfig = QUIET,
    buffer_size: int = 50_000,
    on_batch: OnBatch | None = None,
) -> AsyncIterator[tuple[HealthCollector, list[Publisher]]]:
    """A collector that listens to a publisher for each run, in this process."""
    with contextlib.ExitStack() as stack:
        publishers = [
            stack.enter_context(Publisher(run_id, BusConfig(announce=False)))
            for run_id in run_ids or ("run",)
        ]
        addresses = [publisher.addresses[0] for publisher in publishers]
        collector = HealthCollector.connect(addresses, buffer_size, config=config, on_batch=on_batch)
        async with collector:
            for publisher in publishers:
                for topic in TELEMETRY:
                    assert publisher.wait_for_subscriber(TOPICS[topic], timeout_s=5)
            yield collector, publishers


def test_signals_arrive_in_order_and_can_be_asked_for() -> None:
    async def test() -> None:
        async with collecting() as (collector, [publisher]):
            for step in range(50):
                publisher.publish(batch(signal("fc1", step=step), signal("fc2", seed_id="s1", step=step)))
            await until(lambda: collector.get_collection_stats().available == 100)
            recent = await collector.get_recent_signals(count=5)
            assert [(each.layer_id, each.seed_id, each.step) for each in recent] == [
                ("fc2", "s1", 47), ("fc1", "", 48), ("fc2", "s1", 48), ("fc1", "", 49), ("fc2", "s1", 49),
            ]  # fmt: skip
            assert isinstance(recent, SignalTable)
            assert recent[0] == signal("fc2", seed_id="s1", step=47)
            of_layer = await collector.get_signals_for_layer("fc2", 3)
            assert [each.step for each in of_layer] == [47, 48, 49]
            assert len(await collector.get_signals_for_layer("fc2", seed_id="")) == 0
            assert len(await collector.get_signals_for_layer("fc2", seed_id="s1", run_id="run")) == 50
            assert len(await collector.get_signals_for_layer("nowhere")) == 0
            assert len(await collector.get_recent_signals(0)) == 0
            assert len(await collector.get_recent_signals(1000)) == 100
            with pytest.raises(ConfigError, match="count of at least 0"):
                await collector.get_recent_signals(-1)
            stats = collector.get_collection_stats()
            assert stats.latency_p50_ms <= stats.latency_p95_ms <= stats.latency_p99_ms < 5000
            assert stats.signals_per_s > 0
            assert stats.missed == stats.rejected == stats.bad_timestamps == 0

    run(test)


def test_high_priority_is_processed_first_yet_signals_are_told_by_arrival() -> None:
    batches: list[list[tuple[int, bool]]] = []

    def note(tables: dict[str, SignalTable]) -> None:
        batches.append([(each.step, each.is_ready_for_transition) for each in tables["run"]])

    async def test() -> None:
        async with collecting(on_batch=note) as (collector, _):
            for step in range(4):
                collector.ingest(batch(signal(step=step, is_ready_for_transition=step % 2 == 1)))
            await until(lambda: batches)
            assert batches == [[(1, True), (3, True), (0, False), (2, False)]]
            assert [each.step for each in await collector.get_recent_signals(3)] == [1, 2, 3]

    run(test)


def test_every_signal_is_counted_once() -> None:
    async def test() -> None:
        config = CollectionConfig(window_size=200)
        async with collecting(config=config, buffer_size=50) as (collector, [publisher]):
            for step in range(300):
                publisher.publish(
                    batch(
                        signal("fc1", step=step, health_score=0.8 if step % 50 else 0.1),
                        signal("fc2", step=step, is_ready_for_transition=step % 7 == 0),
                        signal("fc3", step=step, error_count=step % 100 == 0),
                        *[signal(f"more{index}", step=step) for index in range(20)],
                    )
                )
            publisher.publish(ErrorRecoveryEvent("run", 300, "fc1", "non_finite", "", time.time()))
            await until(lambda: collector.get_collection_stats().messages == 301)
            await until(lambda: not collector.get_collection_stats().waiting)
            stats = collector.get_collection_stats()
            assert stats.received == 23 * 300
            assert stats.recovered == 1
            assert stats.received + stats.recovered == stats.passed + stats.thinned + stats.unidentified
            dropped = stats.dropped_normal + stats.dropped_high
            assert stats.passed == stats.available + stats.waiting + dropped
            assert stats.errors == 4
            assert stats.ready == 43
            assert (
                5 <= stats.anomalies <= 10
            )  # from the tenth score on, and returns to normal within a narrow history
            assert stats.kept == 200
            assert stats.num_series == 23
            assert stats.as_dict()["passed"] == stats.passed

    run(test)


def test_a_slow_consumer_loses_normal_signals_first_and_is_warned_about() -> None:
    seen: list[HealthSignal] = []
    gate = asyncio.Event()

    async def slow(tables: dict[str, SignalTable]) -> None:
        seen.extend(tables["run"])
        await gate.wait()

    async def test() -> None:
        config = CollectionConfig(normal_every=1, alert_interval_s=0.01)
        async with collecting(config=config, buffer_size=100, on_batch=slow) as (collector, _):
            collector.ingest(batch(signal(step=0)))
            await until(lambda: seen)  # and now it waits
            collector.ingest(batch(*[signal("fc1", step=1)] * 150))
            collector.ingest(batch(*[signal("fc2", error_count=1, step=2)] * 60))
            stats = collector.get_collection_stats()
            assert (stats.waiting, stats.waiting_high, stats.buffer_fill) == (100, 60, 1.0)
            assert (stats.dropped_normal, stats.dropped_high) == (110, 0)
            await until(lambda: "buffer" in collector.get_collection_stats().alerts)
            gate.set()
            await until(lambda: len(seen) == 101)
            assert [each.layer_id for each in seen[1:]] == ["fc2"] * 60 + ["fc1"] * 40
            await until(lambda: not collector.get_collection_stats().alerts)

    run(test)


def test_runs_are_kept_apart() -> None:
    async def test() -> None:
        async with collecting("a", "b") as (collector, [a, b]):
            for step in range(20):
                a.publish(batch(signal("fc1", step=step, health_score=0.9), run_id="a"))
                b.publish(
                    batch(signal("fc1", step=step, health_score=0.1), signal("other", step=step), run_id="b")
                )
            await until(lambda: collector.get_collection_stats().available == 60)
            for run_id, score in (("a", 0.9), ("b", 0.1)):
                found = await collector.get_signals_for_layer("fc1", run_id=run_id)
                assert {each.health_score for each in found} == {score}
            assert {each.layer_id for each in await collector.get_recent_signals(run_id="a")} == {"fc1"}
            assert len(await collector.get_recent_signals(run_id="nobody")) == 0
            assert len(await collector.get_signals_for_layer("other")) == 20  # only one run has it
            with pytest.raises(ConfigError, match=r"signals of 2 runs are kept here.*: a, b"):
                await collector.get_recent_signals()
            with pytest.raises(ConfigError, match="2 runs have a layer 'fc1': a, b"):
                await collector.get_signals_for_layer("fc1")
            assert (
                collector.get_collection_stats().anomalies == 0
            )  # neither is measured by the other's history

    run(test)


def test_the_other_topics_are_kept_for_each_run() -> None:
    async def test() -> None:
        async with collecting("a", "b") as (collector, [a, b]):
            performance = ModelPerformance("a", 7, 1, 100, 0.5, None, 1000, 1e9, 1, 3.0)
            kernel = KernelPerformance("b", 7, 1.5, 0.1, 3.0)
            cache = CacheHitRates("b", 7, 3, 1, 3.0)
            a.publish(performance)
            b.publish(kernel)
            b.publish(cache)
            b.publish(batch(signal(step=9), run_id="b"))
            await until(lambda: collector.get_collection_stats().messages == 4)
            assert collector.runs["a"].performance == performance
            assert collector.runs["a"].kernel is None
            assert (collector.runs["b"].kernel, collector.runs["b"].cache) == (kernel, cache)
            assert (collector.runs["b"].step, collector.runs["b"].num_signals) == (9, 1)
            a.publish(msgspec.structs.replace(performance, step=8))
            await until(lambda: collector.runs["a"].performance != performance)
            collector.ingest(RunRecord("a", "start", 0, {}, 1.0))  # of a topic that is not collected
            assert collector.get_collection_stats().ignored == 1

    run(test)


def test_an_error_event_becomes_a_signal_of_its_layer_in_its_run() -> None:
    async def test() -> None:
        async with collecting("a", "b") as (collector, [a, b]):
            a.publish(batch(signal("fc1", gradient_norm=3.0), signal("fc2", seed_id="s4"), run_id="a"))
            b.publish(batch(signal("fc1", gradient_norm=9.0), run_id="b"))
            await until(lambda: collector.get_collection_stats().available == 3)
            for name in ("fc1", "s4", "bypass:fc1->fc9", ""):
                a.publish(ErrorRecoveryEvent("a", 50, name, "cull", "non-finite", 123.0))
            await until(lambda: collector.get_collection_stats().available == 6)
            *_, first, second, third = await collector.get_recent_signals(run_id="a")
            assert first == signal(
                "fc1", gradient_norm=3.0, step=50, error_count=1, health_score=0.0, timestamp=123.0
            )
            assert (second.layer_id, second.seed_id, second.error_count) == ("fc2", "s4", 1)
            assert (third.layer_id, third.seed_id, third.gradient_norm) == ("fc9", "", 0.0)
            assert len(await collector.get_recent_signals(run_id="b")) == 1
            stats = collector.get_collection_stats()
            assert (stats.errors, stats.recovered) == (3, 3)
            status = collector.runs["a"]
            assert status.error is not None
            assert status.error.layer_id == ""
            assert status.num_errors == {"fc1": 1, "s4": 1, "bypass:fc1->fc9": 1, "": 1}
            assert len(collector.filter_engine.history("fc1", run_id="a")) == 1

    run(test)


def test_what_makes_no_sense_is_counted_and_does_not_stop_it() -> None:
    async def test() -> None:
        async with collecting() as (collector, [publisher]):
            good = batch(signal())
            times = [math.nan, math.inf, -math.inf, time.time() + 3600, 0.0]
            for timestamp in times:
                publisher.publish(batch(signal(), timestamp=timestamp))
            wrong: list[Any] = [
                msgspec.structs.replace(good, columns=good.columns[:-1]),
                msgspec.structs.replace(good, ids=b"\xc1"),
                msgspec.structs.replace(good, run_id="x" * 1000),
                msgspec.structs.replace(good, run_id=""),
                msgspec.structs.replace(good, run_id=7),  # type: ignore[arg-type]
                msgspec.structs.replace(good, columns=None),  # type: ignore[arg-type]
                msgspec.structs.replace(good, timestamp="noon"),  # type: ignore[arg-type]
                msgspec.structs.replace(good, step=-1),
                batch(signal(health_score=math.nan)),
                ErrorRecoveryEvent("run", 1, 7, "k", "", 0.0),  # type: ignore[arg-type]
                ErrorRecoveryEvent("run", 2**64, "fc1", "k", "", 0.0),
                KernelPerformance("run", "two", 0.0, 0.0, 0.0),  # type: ignore[arg-type]
            ]
            for message in wrong:
                collector.ingest(message)
            collector.ingest("not a message")  # type: ignore[arg-type]
            collector.ingest(batch())  # a batch of nothing is fine
            collector.ingest(ErrorRecoveryEvent("run", 2**63, "fc1", "k", "", math.nan))
            await until(lambda: collector.get_collection_stats().available == len(times) + 1)
            stats = collector.get_collection_stats()
            assert stats.malformed == len(wrong)
            assert stats.ignored == 1
            assert stats.bad_timestamps == 5  # the last of the times is old, and that is possible
            assert collector.running
            newest = (await collector.get_recent_signals(1))[0]
            assert math.isfinite(newest.timestamp)
            publisher.publish(good)
            await until(lambda: collector.get_collection_stats().available == len(times) + 2)

    run(test)


def test_forged_names_do_not_fill_the_memory() -> None:
    async def test() -> None:
        config = CollectionConfig(normal_every=1, max_keys=64, window_size=32)
        async with collecting(config=config) as (collector, _):
            for index in range(100):
                collector.ingest(batch(*[signal(f"{index}.{layer}") for layer in range(20)]))
                await until(lambda: not collector.get_collection_stats().waiting)
            stats = collector.get_collection_stats()
            assert stats.num_series <= 64
            assert stats.unidentified == 0
            assert [each.layer_id for each in await collector.get_recent_signals(3)] == [
                "99.17",
                "99.18",
                "99.19",
            ]
            collector.ingest(batch(*[signal(f"wide{layer}") for layer in range(65)]))
            assert collector.get_collection_stats().unidentified == 65
            assert collector.running

    run(test)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_starting_and_stopping_leaves_nothing_behind() -> None:
    async def test() -> None:
        with Publisher("run", BusConfig(announce=False)) as publisher:
            for round_ in range(12):
                collector = HealthCollector.connect(publisher.addresses[0], config=QUIET)
                await collector.start_intelligent_collection()
                await collector.start_intelligent_collection()  # twice is as good as once
                assert len(asyncio.all_tasks()) == 4
                publisher.publish(batch(signal()))
                await asyncio.sleep(0.005)
                await collector.stop()
                await collector.stop()
                assert not collector.running
                assert len(asyncio.all_tasks()) == 1
                if round_ == 1:  # by now libraries have opened what they keep
                    gc.collect()
                    await asyncio.sleep(0.1)
                    before = open_descriptors(), threading.active_count()
            del collector
            gc.collect()
            await until(lambda: (open_descriptors(), threading.active_count()) <= before)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("descriptors are counted in /proc")
    run(test)


def test_a_given_client_stays_open_and_collecting_can_go_on() -> None:
    async def test() -> None:
        with (
            Publisher("run", BusConfig(announce=False)) as publisher,
            Subscriber(publisher.addresses[0], TELEMETRY) as client,
        ):
            collector = HealthCollector(client, buffer_size=50_000, config=QUIET)
            await collector.start_intelligent_collection()
            publisher.wait_for_subscriber(TOPICS["health"], timeout_s=5)
            publisher.publish(batch(signal(step=1)))
            await until(lambda: collector.get_collection_stats().available == 1)
            await collector.stop()
            assert not client.closed
            publisher.publish(batch(signal(step=2)))
            collector.ingest(batch(signal(step=3)))
            await asyncio.sleep(0.05)
            assert collector.get_collection_stats().waiting == 1
            assert len(await collector.get_recent_signals()) == 1
            await collector.start_intelligent_collection()  # finds what came in between, over either way
            await until(lambda: collector.get_collection_stats().available == 3)
            await collector.stop()
        with pytest.raises(EsperError, match="expected an open subscription"):
            await collector.start_intelligent_collection()

    run(test)


def test_one_loop_after_another() -> None:
    with Publisher("run", BusConfig(announce=False)) as publisher:
        client = Subscriber(publisher.addresses[0], TELEMETRY)
        collectors: list[HealthCollector] = []

        async def first() -> None:
            collectors.append(HealthCollector(client, config=QUIET))
            await collectors[0].start_intelligent_collection()  # and is never stopped

        async def second() -> None:
            assert not collectors[0].running
            async with collectors[0]:
                publisher.wait_for_subscriber(TOPICS["health"], timeout_s=5)
                publisher.publish(batch(signal()))
                await until(lambda: collectors[0].get_collection_stats().available == 1)

        run(first)
        run(second)
        client.close()


def test_a_client_that_is_closed_meanwhile_ends_it_loudly(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with Publisher("run", BusConfig(announce=False)) as publisher:
            client = Subscriber(publisher.addresses[0], TELEMETRY)
            collector = HealthCollector(client)
            await collector.start_intelligent_collection()
            client.close()
            await until(lambda: not collector.running)
            with pytest.raises(
                EsperError, match=r"the health collection has ended: .*stop the collector first"
            ):
                await collector.get_recent_signals()
            with pytest.raises(EsperError, match="was closed: stop the collector first"):
                await collector.stop()
            await collector.stop()  # told once
            assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.ERROR, "esper.tamiyo.collection"):
        run(test)
    assert "the health collection has ended" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_of_the_consumer_ends_it_loudly(is_async: bool) -> None:
    def fail(tables: dict[str, SignalTable]) -> None:
        raise ArithmeticError("in the consumer")

    async def fail_later(tables: dict[str, SignalTable]) -> None:
        await asyncio.sleep(0)
        fail(tables)

    async def test() -> None:
        async with collecting(on_batch=fail_later if is_async else fail) as (collector, _):
            collector.ingest(batch(signal()))
            await until(lambda: not collector.running)
            with pytest.raises(EsperError, match="ArithmeticError"):
                await collector.get_signals_for_layer("fc1")
            with pytest.raises(ArithmeticError, match="in the consumer"):
                await collector.start_intelligent_collection()

    run(test)


def test_a_consumer_may_stop_it() -> None:
    collectors: list[HealthCollector] = []

    async def enough(tables: dict[str, SignalTable]) -> None:
        await collectors[0].stop()

    async def test() -> None:
        async with collecting(on_batch=enough) as (collector, _):
            collectors.append(collector)
            collector.ingest(batch(signal()))
            await until(lambda: not collector.running)
            assert collector.client.closed

    run(test)


def test_stopping_may_be_cancelled_and_still_stops() -> None:
    async def test() -> None:
        ending = asyncio.Event()

        async def takes_its_time(tables: dict[str, SignalTable]) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ending.set()
                await asyncio.sleep(0.05)

        async with collecting(on_batch=takes_its_time) as (collector, _):
            collector.ingest(batch(signal()))
            await until(lambda: collector.get_collection_stats().available == 1)
            stopping = asyncio.create_task(collector.stop())
            await ending.wait()
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping
            assert collector.client.closed
            await collector.stop()
            assert len(asyncio.all_tasks()) == 1

    run(test)


def test_cancelling_whoever_uses_it_stops_it() -> None:
    async def use(started: asyncio.Event) -> None:
        async with collecting():
            started.set()
            await asyncio.sleep(60)

    async def test() -> None:
        started = asyncio.Event()
        user = asyncio.create_task(use(started))
        await started.wait()
        user.cancel()
        with pytest.raises(asyncio.CancelledError):
            await user
        assert len(asyncio.all_tasks()) == 1

    run(test)


def test_silence_is_an_alert_and_statistics_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        config = CollectionConfig(silence_s=0.05, alert_interval_s=0.02, report_interval_s=0.1)
        async with collecting(config=config) as (collector, [publisher]):
            await until(lambda: "silence" in collector.get_collection_stats().alerts)
            while "silence" in collector.get_collection_stats().alerts:
                publisher.publish(batch(signal()))
                await asyncio.sleep(0.001)
            await until(lambda: "signals of 1 runs" in caplog.text)

    with caplog.at_level(logging.INFO, "esper.tamiyo.collection"):
        run(test)
    assert "no health signal for" in caplog.text
    assert "the alert 'silence' has ended" in caplog.text


def test_the_loop_is_never_held_for_long_under_a_flood() -> None:
    """While a thread publishes as fast as it can, others on the loop have their turn."""

    async def test() -> None:
        with Publisher("run", BusConfig(announce=False)) as publisher:
            async with HealthCollector.connect(publisher.addresses[0]) as collector:
                publisher.wait_for_subscriber(TOPICS["health"], timeout_s=5)
                messages = [
                    batch(*[signal(f"layer{layer}", step=step) for layer in range(64)]) for step in range(8)
                ]
                ending = threading.Event()

                def flood() -> None:
                    index = 0
                    while not ending.is_set():
                        publisher.publish(messages[index % 8])
                        index += 1

                thread = threading.Thread(target=flood)
                thread.start()
                most, before, deadline = 0, 0, time.monotonic() + 20
                while collector.statistics.received < 20_000 and time.monotonic() < deadline:
                    await asyncio.sleep(0)
                    now = collector.statistics.messages
                    most, before = max(most, now - before), now
                ending.set()
                thread.join()
                stats = collector.get_collection_stats()
                assert 0 < most <= collector.config.poll_messages
                assert stats.received >= 20_000
                assert stats.passed < 0.2 * stats.received

    run(test)


def test_a_batch_size_of_nothing_is_refused() -> None:
    with Publisher("run", BusConfig(announce=False)) as publisher:
        with pytest.raises(ConfigError, match="processing_batch_size"):
            HealthCollector.connect(publisher.addresses[0], processing_batch_size=0)
        gc.collect()


def test_the_document_calls_it_thus() -> None:
    """``ProductionHealthCollector(oona_client, buffer_size=50000)``, started and asked as in its example."""

    async def test() -> None:
        with (
            Publisher("run", BusConfig(announce=False)) as publisher,
            Subscriber(publisher.addresses[0], TELEMETRY) as oona_client,
        ):
            health_collector = HealthCollector(oona_client, buffer_size=50000)
            begun: Awaitable[None] = health_collector.start_intelligent_collection()
            await asyncio.wait_for(begun, 10.0)
            publisher.wait_for_subscriber(TOPICS["health"], timeout_s=5)
            publisher.publish(SignalBatch.of("run", 1, 0, [signal()], time.time()))
            await until(lambda: len(health_collector.signal_buffer) or health_collector.statistics.available)
            await asyncio.sleep(0.01)
            health_signals = await health_collector.get_recent_signals(count=500)
            assert list(health_signals) == [signal()]
            await health_collector.stop()

    run(test)
