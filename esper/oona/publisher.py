"""The sending end: publishes a run's messages and never makes it wait."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field

import zmq

from esper.errors import MessageError
from esper.messages import Message
from esper.oona.codec import PUBLISHER_ID_BYTES, encode, topic_of
from esper.oona.endpoint import Endpoint

__all__ = ["Publisher", "PublisherStats"]

_LOG = logging.getLogger("esper.oona")
_LOOK_S = 1e-3


@dataclass(slots=True)
class PublisherStats:
    """Counts since the publisher was made.

    Attributes:
        sent: messages handed to the socket.
        unheard: messages nobody had subscribed to; they were not even encoded.
        dropped: messages lost, by reason: ``oversized``, ``unencodable``, ``full``, ``closed``, ``forked``.
    """

    sent: int = 0
    unheard: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """All lost messages together."""
        return sum(self.dropped.values())


class Publisher(Endpoint):
    """Publishes on the run's telemetry endpoint (ZeroMQ ``XPUB``).

    :meth:`publish` neither blocks nor raises for a message that cannot be sent: training goes on, the loss is
    counted. A reader that falls more than ``high_water_mark`` messages behind loses the excess, alone, and
    sees from the sequence numbers how many. Arguments, life cycle, forks: see :class:`Endpoint`.
    """

    role = "telemetry"
    _socket_type = zmq.XPUB

    def _forget(self) -> None:
        super()._forget()
        self.stats = PublisherStats()
        self._publisher_id = secrets.token_bytes(PUBLISHER_ID_BYTES)
        self._sequences: dict[str, int] = {}
        self._subscriptions: dict[bytes, None] = {}
        self._is_heard: dict[str, bool] = {}
        self._looked_at = 0.0
        self._since_look = 0
        self._logged: set[str] = set()

    def publish(self, message: Message) -> bool:
        """Send one message on the topic of its type.

        Args:
            message: any struct of :data:`esper.messages.Message`.

        Returns:
            Whether it went out. False: nobody listens, or it was dropped (see ``stats``).

        Raises:
            MessageError: the object is not a bus message: a mistake of the caller, not of the bus.
        """
        topic = topic_of(message)
        socket = self._own_socket()
        if socket is None:
            return self._drop("closed" if self._closed else "forked", topic)
        sequence = self._sequences.get(topic, 0)
        # every attempt takes a number, so that what is lost here shows as a gap there
        self._sequences[topic] = sequence + 1
        if not self._listened_to(socket, topic):
            self.stats.unheard += 1
            return False
        try:
            data = encode(message, publisher=self._publisher_id, sequence=sequence)
        except MessageError as error:
            return self._drop("unencodable", topic, str(error))
        if len(data) > self.config.max_message_bytes:
            detail = f"{len(data)} bytes, the limit max_message_bytes is {self.config.max_message_bytes}"
            return self._drop("oversized", topic, detail)
        try:
            socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return self._drop("full", topic)
        self.stats.sent += 1
        return True

    def wait_for_subscriber(self, topic: str, *, timeout_s: float) -> bool:
        """Wait until somebody subscribes to a topic; for tests and benchmarks, never for training.

        Args:
            topic: a value of :data:`esper.messages.TOPICS`.
            timeout_s: seconds to wait at most.

        Returns:
            Whether a subscriber is there.
        """
        socket = self._own_socket()
        deadline = time.monotonic() + timeout_s
        while socket is not None:
            self._read_subscriptions(socket)
            left_ms = int(1000 * (deadline - time.monotonic()))
            if self._heard(topic) or left_ms <= 0:
                break
            socket.poll(left_ms, zmq.POLLIN)
        return self._heard(topic)

    def _listened_to(self, socket: zmq.Socket[bytes], topic: str) -> bool:
        """Whether somebody subscribes to the topic, having looked at the socket as seldom as is right.

        A look takes as long as sending. It is due where nobody was heard so far; after a millisecond, because
        somebody may have gone; and well before a queue can fill, because ZeroMQ also learns in it how far the
        readers have read.
        """
        now = time.monotonic()
        self._since_look += 1
        if (
            self._since_look * 16 > self.config.high_water_mark
            or now - self._looked_at > _LOOK_S
            or not self._heard(topic)
        ):
            self._looked_at, self._since_look = now, 0
            self._read_subscriptions(socket)
        return self._heard(topic)

    def _read_subscriptions(self, socket: zmq.Socket[bytes]) -> None:
        # one look at the socket's state costs a tenth of an exception from an empty receive
        while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            notice = socket.recv(zmq.NOBLOCK)
            if notice[:1] == b"\1":
                self._subscriptions[notice[1:]] = None
            elif notice[:1] == b"\0":
                self._subscriptions.pop(notice[1:], None)
            self._is_heard.clear()

    def _heard(self, topic: str) -> bool:
        heard = self._is_heard.get(topic)
        if heard is None:
            name = topic.encode() + b"\0"
            heard = self._is_heard[topic] = any(name.startswith(prefix) for prefix in self._subscriptions)
        return heard

    def _drop(self, reason: str, topic: str, detail: str = "") -> bool:
        self.stats.dropped[reason] = self.stats.dropped.get(reason, 0) + 1
        if reason not in self._logged and reason != "forked":
            self._logged.add(reason)
            _LOG.warning(
                "run %s: a message on %s was not sent (%s%s); further ones are counted without a line",
                self.run_id, topic, reason, f": {detail}" if detail else "",
            )  # fmt: skip
        return False
