"""The receiving end: reads, validates, and counts what is lost or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import zmq

from esper.errors import ConfigError
from esper.messages import TOPICS, Message
from esper.oona.codec import FrameError, read_frame
from esper.oona.config import BusConfig, check_address
from esper.oona.endpoint import inproc_address, new_socket
from esper.oona.keys import Keys
from esper.oona.runs import RunInfo

__all__ = ["Subscriber", "SubscriberStats", "telemetry_address"]

_LOG = logging.getLogger("esper.oona")
_MAX_SENDERS = 1024  # forged publisher ids must not fill the memory


@dataclass(slots=True)
class SubscriberStats:
    """Counts since the subscriber was made.

    Attributes:
        received: valid messages.
        missed: messages the sequence numbers say were sent but did not arrive.
        rejected: refused frames by ground (:data:`esper.oona.codec.Rejection`).
    """

    received: int = 0
    missed: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def num_rejected(self) -> int:
        """All refused frames together."""
        return sum(self.rejected.values())


def telemetry_address(target: str | RunInfo, keys: str = "") -> str:
    """The endpoint to subscribe to.

    Args:
        target: an address (``ipc://``, ``tcp://``, ``inproc://``), the id of a run in this process, or a
            :class:`RunInfo` from :func:`esper.oona.find_runs`.
        keys: folder of CURVE keys, with which other machines may be reached; empty: none.

    Raises:
        ConfigError: the address is malformed, or beyond loopback without keys, or the run publishes nothing.
    """
    if isinstance(target, RunInfo):
        if not target.telemetry:
            raise ConfigError(f"expected run {target.run_id!r} to publish telemetry, but it announces none")
        keys = keys or target.keys
        target = target.telemetry
    if "://" not in target:
        return inproc_address(target, "telemetry")
    if not target.startswith("inproc://"):
        check_address(target, to_bind=False, keys=keys)
    return target


class Subscriber:
    """Subscribes to one or several publishers (ZeroMQ ``SUB``).

    Frames that are malformed, oversized, of another schema version or on an unknown topic are dropped,
    counted, and logged once for each ground. Messages sent before the subscription arrived are not seen.
    Use it in the thread and process that made it.

    Args:
        targets: one or several of what :func:`telemetry_address` takes.
        topics: short names of :data:`esper.messages.TOPICS`; default all.
        config: ``high_water_mark``, ``max_message_bytes`` and ``keys`` are read; default :class:`BusConfig`. A
            :class:`RunInfo` brings the keys it needs.

    Raises:
        ConfigError: an address or a topic is wrong.
    """

    def __init__(
        self,
        targets: str | RunInfo | Iterable[str | RunInfo],
        topics: Iterable[str] | None = None,
        *,
        config: BusConfig | None = None,
    ) -> None:
        chosen = [] if topics is None else list(topics)
        for name in chosen:
            if name not in TOPICS:
                raise ConfigError(f"expected topics from {', '.join(TOPICS)}, got {name!r}")
        listed = [targets] if isinstance(targets, str | RunInfo) else list(targets)
        self.config = config if config is not None else BusConfig()
        known = [run.keys for run in listed if isinstance(run, RunInfo) and run.keys]
        keys = self.config.keys or (known[0] if known else "")
        self.addresses = tuple(telemetry_address(target, keys) for target in listed)
        loaded = Keys.load(keys) if keys else None
        self.stats = SubscriberStats()
        self._next: dict[tuple[bytes, str], int] = {}
        self._socket = new_socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.set_hwm(self.config.high_water_mark)
        # no choice means everything, also topics this version does not know: those are counted
        for prefix in [TOPICS[name].encode() + b"\0" for name in chosen] or [b""]:
            self._socket.subscribe(prefix)
        if loaded is not None:
            loaded.secure_client(self._socket)
        for address in self.addresses:
            self._socket.connect(address)

    def poll(self, timeout_ms: int = 0, *, max_messages: int = 32) -> list[tuple[str, Message]]:
        """Take the messages that are there, waiting for a first one if there is none.

        Args:
            timeout_ms: how long to wait for the first; 0 does not wait.
            max_messages: frames to read at most, so that a flood cannot hold the caller. Small batches of
                messages are also faster: at 512 the objects no longer fit the cache and each message of
                64 signals takes 63 µs instead of 38.

        Returns:
            ``(topic, message)`` in the order of arrival; empty after the timeout.
        """
        if self._socket.closed:
            return []
        messages: list[tuple[str, Message]] = []
        if timeout_ms and not self._socket.poll(timeout_ms):
            return messages
        receive, accept = self._socket.recv, self._accept
        for _ in range(max_messages):
            try:
                data = receive(zmq.NOBLOCK)
            except zmq.Again:
                break
            accept(data, messages)
        return messages

    def fileno(self) -> int:
        """A descriptor that becomes readable when :meth:`poll` may have something, for an event loop.

        Only a change makes it readable, and reading takes the mark away: poll until nothing comes, then wait.

        Raises:
            ValueError: the subscriber is closed.
        """
        if self._socket.closed:
            raise ValueError(f"{self!r} has no descriptor")
        return int(self._socket.getsockopt(zmq.FD))

    def _accept(self, data: bytes, messages: list[tuple[str, Message]]) -> None:
        try:
            topic, publisher, sequence, message = read_frame(
                data, max_message_bytes=self.config.max_message_bytes
            )
        except FrameError as error:
            self._reject(error)
            return
        sender = (publisher, topic)
        expected = self._next.get(sender)
        if expected is None:
            if len(self._next) >= _MAX_SENDERS:
                del self._next[next(iter(self._next))]
        elif sequence > expected:
            self.stats.missed += sequence - expected
        self._next[sender] = sequence + 1 if expected is None else max(sequence + 1, expected)
        self.stats.received += 1
        messages.append((topic, message))

    def _reject(self, error: FrameError) -> None:
        count = self.stats.rejected.get(error.kind, 0)
        self.stats.rejected[error.kind] = count + 1
        if not count:
            _LOG.warning(
                "dropped a message from %s (%s): %s; further ones of this kind are counted without a line",
                ", ".join(self.addresses), error.kind, error,
            )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[str, Message]]:
        """Messages as they come, waiting for each, until :meth:`close`."""
        while not self._socket.closed:
            yield from self.poll(100)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._socket.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Subscriber({', '.join(self.addresses)}{', closed' if self.closed else ''})"
