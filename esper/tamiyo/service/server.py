"""The service with its sockets: reads, decides, answers, ends in good order."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import zmq

from esper.errors import ConfigError
from esper.oona.doorman import Doorman
from esper.oona.endpoint import is_taken
from esper.oona.keys import Keys
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.deciders import Decider, make_decider
from esper.tamiyo.service.desk import Book, Desk
from esper.tamiyo.service.protocol import Reply, write
from esper.tamiyo.service.stats import ServiceStats
from esper.tamiyo.service.web import Web

__all__ = ["DecisionServer"]

_LOG = logging.getLogger("esper.tamiyo.service")
_READ_AT_ONCE = 256
_TICK_S = 0.1
"""How long the service sleeps at most: so quickly it notices that it is to stop."""
_ALIVE_S = 10.0
"""Silence of the loop after which /healthz gives it up."""
_HARD_LIMIT_FACTOR = 4
"""ZeroMQ itself hangs up on a peer that sends more than so many times the limit."""


class DecisionServer:
    """Tamiyo behind a socket, for many training runs at once.

    The socket is bound when the service is made or entered, so that runs may connect before :meth:`run` begins;
    :meth:`run` reads, decides and answers in the calling thread until :meth:`stop`. Each request is stored before
    it is answered.

    Args:
        config: Addresses, limits, thresholds.
        decider: Who chooses; default what the config names.
        book: Where decisions are written; default the config's store.

    Raises:
        ConfigError: An address cannot be bound, keys are missing, or there is no such decider.
        MissingExtraError: /metrics is asked for, and its extra is not installed.
    """

    def __init__(
        self, config: ServiceConfig | None = None, *, decider: Decider | None = None, book: Book | None = None
    ) -> None:
        self.config = config if config is not None else ServiceConfig()
        self.service_id = uuid.uuid4().hex[:12]
        self.stats = ServiceStats()
        self.address = ""
        self._closing = contextlib.ExitStack()
        self._stop = threading.Event()
        self._turned_at = time.monotonic()
        self._bound = False
        with contextlib.ExitStack() as failing:
            failing.callback(self.close)
            self.desk = Desk(
                self.config,
                decider if decider is not None else make_decider(self.config.decider),
                book if book is not None else self._open_book(),
                service_id=self.service_id,
                stats=self.stats,
            )
            self._socket = self._bind()
            self.web = self._open_web()
            failing.pop_all()

    def _open_book(self) -> Book:
        from esper.tamiyo.service.book import ExperienceBook

        return self._closing.enter_context(ExperienceBook(self.config.store))

    def _bind(self) -> zmq.Socket[bytes]:
        config = self.config
        # a context of its own: nobody else's sockets hold up its end, and it has its own doorman
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._closing.callback(context.destroy, linger=config.linger_ms)
        socket = context.socket(zmq.ROUTER)
        socket.linger = config.linger_ms
        socket.set_hwm(2 * config.max_queue)
        socket.setsockopt(zmq.MAXMSGSIZE, _HARD_LIMIT_FACTOR * config.max_message_bytes)
        # a peer whose machine has vanished is noticed by ZeroMQ, its queue with it
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * config.heartbeat_s))
        if config.keys:
            doorman = Doorman(context)
            self._closing.callback(doorman.close)
            doorman.guard(socket, Keys.load(config.keys))
            self._doorman: Doorman | None = doorman
        else:
            self._doorman = None
        try:
            if config.address.startswith("ipc://") and is_taken(config.address):
                raise zmq.ZMQError(
                    zmq.EADDRINUSE
                )  # ZeroMQ would take the path over from whoever listens there
            socket.bind(config.address)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"expected to bind {config.address}, but: {zmq.strerror(error.errno or 0)}; choose another address"
            ) from error
        if config.address.startswith("ipc://"):
            self._closing.callback(Path(config.address.removeprefix("ipc://")).unlink, missing_ok=True)
        self._closing.callback(socket.close)
        self.address = str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        self._bound = True
        return socket

    def _open_web(self) -> Web | None:
        if not self.config.http_address:
            return None
        host, port = self.config.http_host_port()
        return self._closing.enter_context(Web(host, port, self))

    # ---------------------------------------------------------------- running

    def run(self) -> None:
        """Serve until :meth:`stop`; then finish what is queued and close."""
        try:
            while not self._stop.is_set():
                self._turn(min(_TICK_S, self.desk.wait_s()))
            self._finish()
        finally:
            self.close()

    def _turn(self, wait_s: float) -> None:
        """Read what has come, decide what is due, answer."""
        self._turned_at = time.monotonic()
        if self._socket.poll(int(1000 * wait_s)):
            for _ in range(_READ_AT_ONCE):
                try:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                # a peer that sends several parts is no run; what it says last is read, and refused
                if (reply := self.desk.take(parts[0], parts[-1] if len(parts) == 2 else b"")) is not None:
                    self._send(parts[0], reply)
        for sender, reply in self.desk.decide():
            self._send(sender, reply)
        for run_id in self.desk.expire():
            _LOG.info("run %s has not been heard of for %g s and is forgotten", run_id, self.config.expiry_s)

    def _send(self, sender: bytes, reply: Reply) -> None:
        # A ROUTER drops what is for a peer that has gone; one that reads too slowly asks again by its request id.
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([sender, write(reply)], zmq.NOBLOCK)

    def _finish(self) -> None:
        """Answer everything that waits; refuse what still comes."""
        self.desk.stopping = True
        while self.desk.runs.num_waiting:
            self._turn(0.0)
        _LOG.info("ending after %d decisions", sum(self.stats.decisions.values()))

    def stop(self) -> None:
        """End :meth:`run` soon; may be called from any thread, and from a signal handler."""
        self._stop.set()

    @contextlib.contextmanager
    def until_signal(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end :meth:`run` in good order; a second one ends it at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self.stop()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Close sockets, store and web page, without answering what waits. Idempotent."""
        self._bound = False
        self._closing.close()

    # ---------------------------------------------------------------- health

    @property
    def alive(self) -> bool:
        """Whether the loop turns."""
        return self._bound and time.monotonic() - self._turned_at < _ALIVE_S

    @property
    def unready(self) -> str:
        """Why requests are not decided now; empty when they are."""
        if not self.alive:
            return "the service does not run"
        if self._stop.is_set():
            return "the service is ending"
        if not self.desk.store_works:
            return "the store does not work"
        return "" if self.desk.runs.num_waiting < self.config.max_queue else "the queue is full"

    @property
    def keys_refused(self) -> int:
        """Handshakes of unknown keys."""
        return self._doorman.refused if self._doorman is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DecisionServer({self.address}, {self.desk.decider.name}, {len(self.desk.runs)} runs)"
