"""A process that publishes health signals like those of a training run, as fast as its reader or at a pace.

The health of each of 64 layers and seeds wanders around a level of its own; one signal in a hundred lies far
from it, one in two hundred says that a seed is ready, one in a thousand counts an error. Times of publishing are
stamped as each message is sent; all else is made beforehand, so that the sender costs little beside its reader.

A PUB socket that outruns its reader loses messages. So the reader counts what it has read in shared memory,
and a sender without a pace stays at most a fixed window ahead.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from esper.errors import EsperError
from esper.messages import TOPICS, SignalBatch
from esper.oona import BusConfig, Publisher
from esper.signal_table import SignalTable

__all__ = ["RUN_ID", "SIGNALS_PER_BATCH", "SignalStream", "signal_stream", "signal_tables"]

SIGNALS_PER_BATCH = 64
RUN_ID = "bench-signals"
_WINDOW = 256  # messages under way; ZeroMQ's own mark is 1000
_STRIDE = 16
_BANK = 512
_START_S = 60.0


def signal_tables(num: int, layer_ids: tuple[str, ...], *, seed: int = 0) -> list[SignalTable]:
    """Tables of ``num`` consecutive sampled steps of a run.

    Args:
        num: Steps.
        layer_ids: Layers; every second signal is of a seed at the layer before.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    size = len(layer_ids)
    seed_ids = tuple(f"s{index}" if index % 2 else "" for index in range(size))
    level, drift = rng.uniform(0.4, 0.9, size), np.zeros(size)
    tables = []
    for step in range(num):
        drift = 0.95 * drift + rng.normal(0.0, 0.01, size)
        strange = rng.random(size) < 0.01
        errors = (rng.random(size) < 0.001).astype(np.uint64)
        health = np.clip(level + drift - 0.4 * strange, 0.0, 1.0) * (errors == 0)
        tables.append(
            SignalTable.of_step(
                layer_ids,
                seed_ids,
                step=step,
                epoch=step // 100,
                timestamp=float(step),
                statistics=rng.random((8, size)),
                expressivity=rng.random(size),
                ready=(rng.random(size) < 0.005).tolist(),
                health=health,
                latency_ms=rng.exponential(0.2, size),
                error_count=errors,
                active_seeds=np.ones(size, dtype=np.uint64),
                total_seeds=np.ones(size, dtype=np.uint64),
            )
        )
    return tables


class SignalStream:
    """The reader's side of the process; made by :func:`signal_stream`.

    Attributes:
        address: Where to subscribe.
    """

    def __init__(self, control: Connection, shared: _Shared, address: str) -> None:
        self._control, self._shared = control, shared
        self.address = address

    def begin(self, signals_per_s: float = 0.0) -> None:
        """Send from now on, once a subscriber is there: as fast as it is read, or at a pace."""
        self._shared.read.value = self._shared.stop.value = 0
        self._control.send(signals_per_s)

    def has_read(self, num_messages: int) -> None:
        """Say how many messages have been read since :meth:`begin`."""
        self._shared.read.value = num_messages

    def ended(self) -> bool:
        """Ask the sender to pause; whether it has. Call until it has, reading in between."""
        self._shared.stop.value = 1
        if not self._control.poll(0):
            return False
        self._control.recv()
        return True


class _Shared:
    """Counters in memory that both processes see."""

    def __init__(self, context: Any) -> None:
        self.read = context.RawValue("q", 0)
        self.stop = context.RawValue("b", 0)


@contextmanager
def signal_stream() -> Iterator[SignalStream]:
    """Start the process, and end it.

    Raises:
        EsperError: it did not start.
    """
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context)
    control, remote = context.Pipe()
    process = context.Process(target=_send, args=(remote, shared), daemon=True)
    process.start()
    remote.close()
    try:
        if not control.poll(_START_S):
            raise EsperError(f"expected the sending process to start within {_START_S:g} s, but it did not")
        try:
            address = control.recv()
        except EOFError:
            raise EsperError(
                "expected the sending process to start, but it ended; its error stands above"
            ) from None
        yield SignalStream(control, shared, address)
        shared.stop.value = 1
        control.send(None)
        process.join(10)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
        control.close()


def _send(control: Connection, shared: _Shared) -> None:
    layer_ids = tuple(f"model.blocks.{index // 2}.linear" for index in range(SIGNALS_PER_BATCH))
    tables = signal_tables(_BANK, layer_ids)
    with Publisher(RUN_ID, BusConfig(transport="ipc", announce=False)) as publisher:

        def send(index: int) -> None:
            table = tables[index % _BANK]
            publisher.publish(SignalBatch(RUN_ID, index, 0, table.ids, table.columns, time.time()))

        control.send(publisher.addresses[-1])
        while (signals_per_s := control.recv()) is not None:
            publisher.wait_for_subscriber(TOPICS["health"], timeout_s=_START_S)
            if signals_per_s:
                _send_paced(send, shared, SIGNALS_PER_BATCH / signals_per_s)
            else:
                _send_windowed(send, shared)
            control.send("paused")


def _send_windowed(send: Callable[[int], None], shared: _Shared) -> None:
    index = 0
    while not shared.read.value and not shared.stop.value:  # what is sent before a reader has joined is lost
        send(index)
        index += 1
        time.sleep(1e-3)
    num_sent = shared.read.value
    while not shared.stop.value:
        if num_sent - shared.read.value > _WINDOW - _STRIDE:
            time.sleep(1e-4)
            continue
        for _ in range(_STRIDE):
            send(index)
            index += 1
        num_sent += _STRIDE


def _send_paced(send: Callable[[int], None], shared: _Shared, interval_s: float) -> None:
    due = time.perf_counter()
    index = 0
    while not shared.stop.value:
        due += interval_s
        time.sleep(max(0.0, due - time.perf_counter()))
        send(index)
        index += 1
