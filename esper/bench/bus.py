"""Throughput and latency of the bus, beside raw pyzmq carrying the same bytes.

A sender in a process of its own publishes batches of 64 signals; the reader here decodes, validates and
collects them. The sender's work on each message begins with what the probes have in hand at the end of a
sampled step (a table of statistics, arrays and lists of Python numbers), goes through the calls that a training run
makes, and numbers every message anew. The raw arm sends frames of the same bytes, ready made, through a bare
PUB socket to a bare SUB socket that drops them unread. A PUB socket that outruns its reader loses messages,
which would reward whoever sends faster than the other reads; so in both arms the reader counts what it has
read in shared memory, and the sender stays at most a fixed window ahead. Both arms run in turns within one
run, and the ratio is taken within each pair of turns. What is counted is what arrived.

Caveat: where other work keeps the processors busy, or there are only two for the four threads, the ratio
compares processor time: of raw ZeroMQ alone, and of raw ZeroMQ with columns made, packed, read and validated
in Python on top, some 20 to 30 µs a batch. The raw arm itself varies twofold there from turn to turn.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zmq

from esper.errors import EsperError
from esper.messages import TOPICS, SignalBatch
from esper.oona import BusConfig, Collector, Publisher, Subscriber, encode
from esper.signal_table import SignalTable

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Oona: signals per second and latency, beside raw pyzmq with the same bytes"
TARGETS: dict[str, tuple[str, float]] = {
    "ipc_ratio": (">=", 0.5),
    "tcp_ratio": (">=", 0.5),
    "ipc_signals_per_s": (">=", 1e6),
    "tcp_signals_per_s": (">=", 1e6),
    "ipc_p99_ms": ("<=", 5.0),
    "tcp_p99_ms": ("<=", 5.0),
}

SIGNALS_PER_BATCH = 64
LATENCY_SIGNALS_PER_S = 10_000
_RUN_ID = "bench-bus"
_WINDOW = (
    256  # batches in flight. ZeroMQ learns of what was read in steps of half its mark, 1000: 256 fit beside
)
_STRIDE = 32  # batches between two looks at the shared counters
_TURNS = 3
_SENT = np.array([0, 1, 2, 3, 4, 6, 7, 8])  # the statistics that stand in a signal; 9 is the error count

_IDS = (
    tuple(f"model.blocks.{index // 2}.linear" for index in range(SIGNALS_PER_BATCH)),
    tuple(f"seed-{index // 2}" if index % 2 else "" for index in range(SIGNALS_PER_BATCH)),
)

Transport = Literal["ipc", "tcp"]


def run(*, seconds: float = 12.0) -> dict[str, float]:
    """Measure both transports.

    Args:
        seconds: time to measure altogether, spread over throughput and latency of both transports.

    Returns:
        For each transport ``T`` of ``ipc`` and ``tcp``: ``T_signals_per_s``, ``T_raw_signals_per_s``,
        ``T_ratio`` (medians over turns), ``T_p50_ms`` and ``T_p99_ms`` at 10,000 signals/s from the time
        stamped in the sender to the collector's hands, ``T_missed`` batches over all turns.

    Raises:
        EsperError: the sender did not start, or nothing arrived.
    """
    figures: dict[str, float] = {}
    transports: tuple[Transport, ...] = ("ipc", "tcp")
    for transport in transports:
        for name, figure in _measure(transport, seconds / len(transports)).items():
            figures[f"{transport}_{name}"] = figure
    return figures


def _measure(transport: Transport, seconds: float) -> dict[str, float]:
    turn_s = seconds / (2 * _TURNS + 2)  # two turns' worth goes to latency
    ours, raw = [], []
    with (
        _sender_process(transport) as (control, shared, addresses),
        Subscriber(addresses[0], ["health"]) as subscriber,
        _raw_reader(addresses[1]) as socket,
    ):
        collector = Collector(subscriber)
        for _ in range(_TURNS):
            ours.append(_turn(control, shared, "bus", lambda: len(collector.drain(20)), turn_s))
            raw.append(_turn(control, shared, "raw", lambda: _read_raw(socket), turn_s))
        latencies_ms = _latencies_ms(control, shared, collector, 2 * turn_s)
        missed = subscriber.stats.missed
        if subscriber.stats.num_rejected:
            raise EsperError(f"expected every message to be valid, but refused {subscriber.stats.rejected}")
    percentiles = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    return {
        "signals_per_s": SIGNALS_PER_BATCH * statistics.median(ours),
        "raw_signals_per_s": SIGNALS_PER_BATCH * statistics.median(raw),
        "ratio": statistics.median(bus / bare for bus, bare in zip(ours, raw, strict=True)),
        "p50_ms": percentiles[49],
        "p99_ms": percentiles[98],
        "missed": float(missed),
    }


class _Shared:
    """Counters in memory that both processes see."""

    def __init__(self, context: Any) -> None:
        self.read = context.RawValue("q", 0)
        self.stop = context.RawValue("b", 0)


@contextmanager
def _sender_process(transport: Transport) -> Iterator[tuple[Connection, _Shared, tuple[str, str]]]:
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context)
    control, remote = context.Pipe()
    process = context.Process(target=_send, args=(remote, shared, transport), daemon=True)
    process.start()
    remote.close()
    try:
        if not control.poll(60):
            raise EsperError("expected the sending process to start within 60 s, but it did not")
        yield control, shared, control.recv()
        control.send("end")
        process.join(10)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        control.close()


def _turn(control: Connection, shared: _Shared, mode: str, read: Callable[[], int], seconds: float) -> float:
    """Batches per second that one arm delivered in one turn."""
    _begin(control, shared, mode)
    num_read, first, now = 0, 0.0, time.perf_counter()
    give_up = now + 10.0 + seconds
    while now < (first + seconds if first else give_up):
        num_read += read()
        shared.read.value = num_read
        now = time.perf_counter()
        if num_read and not first:
            first, num_first = now, num_read
    if not first:
        raise EsperError(
            f"expected batches from the sending process ({mode}), got none in {seconds + 10:g} s"
        )
    rate = (num_read - num_first) / (now - first)
    _end(control, shared, read)
    return rate


def _latencies_ms(control: Connection, shared: _Shared, collector: Collector, seconds: float) -> list[float]:
    """From the sender's time stamp to the collector's hands, per batch; the first tenth is warm-up."""
    _begin(control, shared, "paced")
    latencies_ms: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        messages = collector.drain(20)
        now = time.time()
        latencies_ms += [
            1000 * (now - message.timestamp) for _, message in messages if isinstance(message, SignalBatch)
        ]
    _end(control, shared, lambda: len(collector.drain(20)))
    kept = latencies_ms[len(latencies_ms) // 10 :]
    if len(kept) < 2:
        raise EsperError(f"expected paced batches for {seconds:g} s, got {len(latencies_ms)}")
    return kept


def _begin(control: Connection, shared: _Shared, mode: str) -> None:
    shared.read.value = shared.stop.value = 0
    control.send(mode)


def _end(control: Connection, shared: _Shared, read: Callable[[], int]) -> None:
    """Stop the sender and read what is still under way."""
    shared.stop.value = 1
    while not control.poll(0):
        read()
    control.recv()
    while read():
        pass


@contextmanager
def _raw_reader(address: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.subscribe(TOPICS["health"].encode())
        socket.connect(address)
        yield socket


def _read_raw(socket: zmq.Socket[bytes]) -> int:
    """Read what is there, as :meth:`Subscriber.poll` does, and drop it."""
    num_read = 0
    if socket.poll(20):
        receive = socket.recv
        try:
            for num_read in range(32):  # noqa: B007 (used after the loop)
                receive(zmq.NOBLOCK)
            num_read = 32
        except zmq.Again:
            pass
    return num_read


def _send(control: Connection, shared: _Shared, transport: Transport) -> None:
    """The sending process: one publisher and one raw socket, each driven in its turns."""
    steps = [_Step(seed) for seed in range(16)]
    frames = [encode(step.batch(seed), sequence=seed) for seed, step in enumerate(steps)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with (
        Publisher(_RUN_ID, BusConfig(transport=transport)) as publisher,
        context.socket(zmq.XPUB) as raw,
    ):
        raw.linger = 0
        raw.bind("tcp://127.0.0.1:*" if transport == "tcp" else publisher.addresses[-1] + ".raw")
        raw_address = str(raw.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        control.send((publisher.addresses[-1], raw_address))
        publisher.wait_for_subscriber(TOPICS["health"], timeout_s=30)
        raw.poll(30_000)
        while (mode := control.recv()) != "end":
            if mode == "paced":
                _send_paced(publisher, steps, shared)
            else:
                send = _bus_send(publisher, steps) if mode == "bus" else _raw_send(raw, frames)
                _send_windowed(send, shared)
            control.send("stopped")
    if transport == "ipc":
        Path(raw_address.removeprefix("ipc://")).unlink(missing_ok=True)


def _bus_send(publisher: Publisher, steps: list[_Step]) -> Callable[[int], object]:
    publish = publisher.publish
    return lambda index: publish(steps[index % 16].batch(index))


def _raw_send(socket: zmq.Socket[bytes], frames: list[bytes]) -> Callable[[int], object]:
    send = socket.send
    return lambda index: send(frames[index % 16], zmq.NOBLOCK)


def _send_windowed(send: Callable[[int], object], shared: _Shared) -> None:
    num_sent = 0
    while not shared.stop.value:
        if num_sent - shared.read.value > _WINDOW - _STRIDE:
            time.sleep(1e-4)
            continue
        for index in range(num_sent, num_sent + _STRIDE):
            send(index)
        num_sent += _STRIDE


def _send_paced(publisher: Publisher, steps: list[_Step], shared: _Shared) -> None:
    interval_s = SIGNALS_PER_BATCH / LATENCY_SIGNALS_PER_S
    due = time.perf_counter()
    index = 0
    while not shared.stop.value:
        due += interval_s
        time.sleep(max(0.0, due - time.perf_counter()))
        publisher.publish(steps[index % 16].batch(index))
        index += 1


class _Step:
    """What the probes of a network of 32 layers with a seed each have in hand at the end of one step."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed).random
        self.layer_ids, self.seed_ids = _IDS
        scales = (4.0, 1.0, 1.0, 1.0, 60.0, 1.0, 1.0, 10.0, 1e-3, 0.0)
        # [n, 10] float64 in the order of esper.kasmina.statistics.LayerStatistics: a tensor's memory there
        self.statistics = np.array([[scale * draw() for scale in scales] for _ in self.layer_ids])
        self.scores, self.latencies_ms = ([draw() for _ in self.layer_ids] for _ in range(2))
        self.health = np.array([draw() for _ in self.layer_ids])
        self.ready = [bool(seed_id) for seed_id in self.seed_ids]
        self.active, self.total = np.ones((2, SIGNALS_PER_BATCH), dtype=np.uint64)

    def batch(self, step: int) -> SignalBatch:
        """Turn it into a message, as ``ProbeRunner.end`` and ``Recorder.signals`` do."""
        now = time.time()
        table = SignalTable.of_step(
            self.layer_ids,
            self.seed_ids,
            step=step,
            epoch=3,
            timestamp=now,
            statistics=self.statistics.T.take(_SENT, 0),
            expressivity=self.scores,
            ready=self.ready,
            health=self.health,
            latency_ms=self.latencies_ms,
            error_count=self.statistics[:, 9],
            active_seeds=self.active,
            total_seeds=self.total,
        )
        return SignalBatch.of(_RUN_ID, step, 3, table, now)
