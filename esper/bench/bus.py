"""Throughput and latency of the bus, beside raw pyzmq carrying the same bytes.

A sender in a process of its own publishes batches of 64 signals; the reader here decodes, validates and
collects them. The raw arm sends the very same frames, ready made, through a bare PUB socket to a bare SUB
socket that drops them unread. A PUB socket that outruns its reader loses messages, which would reward
whoever sends faster than the other reads; so in both arms the reader counts what it has read in shared
memory, and the sender stays at most a fixed window ahead. Both arms run in turns within one run, and the
ratio is taken within each pair of turns. What is counted is what arrived.

Caveat: turning 64 signals of 21 fields into Python objects takes msgspec some 24 µs, about what it takes
raw ZeroMQ to move one and a half such messages on two idle cores. On a machine that is busy with other work
the ratio falls further, because then it compares processor time.
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

import zmq

from esper.errors import EsperError
from esper.messages import TOPICS, HealthSignal, SignalBatch
from esper.oona import BusConfig, Collector, Publisher, Subscriber, encode

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
_WINDOW = 512  # batches in flight; half of the default high-water mark
_STRIDE = 32  # batches between two looks at the shared counters
_TURNS = 3

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
    batches = [_batch(seed) for seed in range(16)]
    frames = [encode(batch, sequence=seed) for seed, batch in enumerate(batches)]
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
                _send_paced(publisher, batches, shared)
            else:
                send = _bus_send(publisher, batches) if mode == "bus" else _raw_send(raw, frames)
                _send_windowed(send, shared)
            control.send("stopped")
    if transport == "ipc":
        Path(raw_address.removeprefix("ipc://")).unlink(missing_ok=True)


def _bus_send(publisher: Publisher, batches: list[SignalBatch]) -> Callable[[int], object]:
    publish = publisher.publish
    return lambda index: publish(batches[index % 16])


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


def _send_paced(publisher: Publisher, batches: list[SignalBatch], shared: _Shared) -> None:
    interval_s = SIGNALS_PER_BATCH / LATENCY_SIGNALS_PER_S
    due = time.perf_counter()
    index = 0
    while not shared.stop.value:
        due += interval_s
        time.sleep(max(0.0, due - time.perf_counter()))
        batch = batches[index % 16]
        publisher.publish(
            SignalBatch(
                run_id=batch.run_id, step=index, epoch=0, signals=batch.signals, timestamp=time.time()
            )
        )
        index += 1


def _batch(seed: int) -> SignalBatch:
    """One sampled step of a network of 32 layers with a seed each."""
    draw = random.Random(seed).random
    signals = [
        HealthSignal(
            layer_id=f"model.blocks.{index // 2}.linear",
            seed_id=f"seed-{index // 2}" if index % 2 else "",
            chunk_id=0,
            epoch=3,
            step=1200 + seed,
            activation_variance=4 * draw(),
            dead_neuron_ratio=draw(),
            dormancy=draw(),
            avg_correlation=2 * draw() - 1,
            effective_rank=60 * draw(),
            gradient_norm=draw(),
            gradient_snr=10 * draw(),
            update_ratio=1e-3 * draw(),
            expressivity=draw(),
            is_ready_for_transition=bool(index % 2),
            health_score=draw(),
            execution_latency=draw(),
            error_count=0,
            active_seeds=1,
            total_seeds=1,
            timestamp=1.8e9 + draw(),
        )
        for index in range(SIGNALS_PER_BATCH)
    ]
    return SignalBatch(run_id=_RUN_ID, step=1200 + seed, epoch=3, signals=signals, timestamp=1.8e9)
