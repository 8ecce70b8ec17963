"""Frames of the bus: one message as bytes, and bytes as one message.

A frame is a single ZeroMQ part::

    topic | 0x00 | magic "ESPR" | version u16 | publisher 8 bytes | sequence u64 | MessagePack payload

The topic comes first because ZeroMQ subscriptions match a frame's first bytes. ``publisher`` is drawn
anew whenever a socket is opened, ``sequence`` counts a publisher's messages on one topic, so that a
reader can tell how many it missed. Integers are big-endian.

Everything that arrives is untrusted: :func:`read_frame` returns a validated message or raises
:class:`FrameError`, whatever the bytes are.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from esper.errors import MessageError
from esper.messages import (
    SCHEMA_VERSION,
    TOPICS,
    CacheHitRates,
    Command,
    CommandReply,
    ErrorRecoveryEvent,
    Event,
    KernelPerformance,
    Message,
    ModelPerformance,
    SignalBatch,
)

__all__ = [
    "MAX_MESSAGE_BYTES",
    "PUBLISHER_ID_BYTES",
    "Frame",
    "FrameError",
    "Rejection",
    "decode",
    "encode",
    "read_frame",
    "topic_of",
]

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Default limit on a frame, in bytes: a thousand times a usual batch of signals."""
PUBLISHER_ID_BYTES = 8

Rejection = Literal["malformed", "oversized", "version", "unknown"]
"""Why a frame was refused: not a frame or not a valid message; too large; written by another schema
version; a topic that this version does not know."""

_MAGIC = b"ESPR"
_HEADER = struct.Struct(f"!4sH{PUBLISHER_ID_BYTES}sQ")
_NO_PUBLISHER = bytes(PUBLISHER_ID_BYTES)

_CONTENTS: dict[str, Any] = {
    TOPICS["health"]: SignalBatch,
    TOPICS["kernel"]: KernelPerformance,
    TOPICS["cache"]: CacheHitRates,
    TOPICS["errors"]: ErrorRecoveryEvent,
    TOPICS["performance"]: ModelPerformance,
    TOPICS["growth"]: Event,
    TOPICS["commands"]: Command,
    TOPICS["replies"]: CommandReply,
}
"""Topic -> the message types that may travel on it."""

_TOPIC_OF: dict[type, str] = {
    kind: topic for topic, content in _CONTENTS.items() for kind in (get_args(content) or (content,))
}
_PREFIX_OF = {kind: topic.encode() + b"\0" for kind, topic in _TOPIC_OF.items()}
_DECODER_OF = {
    topic.encode(): (topic, msgspec.msgpack.Decoder(content)) for topic, content in _CONTENTS.items()
}
_ENCODER = msgspec.msgpack.Encoder()
_SEARCH_BYTES = 256  # no topic is longer: keeps a large foreign blob from being searched to its end


class FrameError(MessageError):
    """A frame was refused; ``kind`` says on what ground, the text says what to do."""

    def __init__(self, kind: Rejection, text: str) -> None:
        super().__init__(text)
        self.kind: Rejection = kind


class Frame(NamedTuple):
    """A decoded frame."""

    topic: str
    publisher: bytes
    sequence: int
    message: Message


def topic_of(message: Message) -> str:
    """The topic on which a message of this type travels.

    Raises:
        MessageError: the object is none of the types of :data:`esper.messages.Message`.
    """
    try:
        return _TOPIC_OF[type(message)]
    except KeyError:
        raise MessageError(
            f"expected one of the messages of esper.messages, got {type(message).__name__}: "
            f"only {', '.join(sorted(kind.__name__ for kind in _TOPIC_OF))} may travel on the bus"
        ) from None


def encode(message: Message, *, publisher: bytes = _NO_PUBLISHER, sequence: int = 0) -> bytes:
    """Write one message as a frame.

    Args:
        message: any struct of :data:`esper.messages.Message`.
        publisher: who sends, :data:`PUBLISHER_ID_BYTES` bytes.
        sequence: position among the publisher's messages on this topic, from 0.

    Raises:
        MessageError: the object is not a bus message, or holds something MessagePack cannot carry.
    """
    prefix = _PREFIX_OF.get(type(message))
    if prefix is None:
        topic_of(message)  # raises, with the list of types
        raise AssertionError("unreachable: _PREFIX_OF and _TOPIC_OF share their keys")
    assert len(publisher) == PUBLISHER_ID_BYTES, f"publisher id of {len(publisher)} bytes"
    try:
        payload = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(
            f"expected a {type(message).__name__} of plain numbers, strings, lists and mappings, "
            f"but it cannot be written as MessagePack: {error}"
        ) from error
    return b"".join((prefix, _HEADER.pack(_MAGIC, SCHEMA_VERSION, publisher, sequence), payload))


def read_frame(data: bytes, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Frame:
    """Read one frame, validating its size, header, version, topic and every field of the message.

    Args:
        data: the bytes as they arrived.
        max_message_bytes: frames longer than this are refused unread.

    Raises:
        FrameError: with the ground in ``kind``; nothing else is raised, whatever the bytes.
    """
    if len(data) > max_message_bytes:
        raise FrameError(
            "oversized",
            f"expected a frame of at most {max_message_bytes} bytes, got {len(data)}: "
            "raise max_message_bytes on the bus if messages of this size are meant",
        )
    end = data.find(b"\0", 0, _SEARCH_BYTES)
    body = end + 1 + _HEADER.size
    if end < 0 or len(data) < body:
        raise FrameError(
            "malformed",
            f"expected a topic, a zero byte and a header of {_HEADER.size} bytes, got {len(data)} bytes "
            f"that begin {data[:24]!r}: the sender is not an esper bus",
        )
    magic, version, publisher, sequence = _HEADER.unpack_from(data, end + 1)
    if magic != _MAGIC:
        raise FrameError(
            "malformed", f"expected the magic bytes {_MAGIC!r}, got {magic!r}: the sender is not an esper bus"
        )
    if version != SCHEMA_VERSION:
        older = "sender" if version < SCHEMA_VERSION else "reader"
        raise FrameError(
            "version",
            f"expected messages of schema version {SCHEMA_VERSION}, got version {version}: "
            f"upgrade esper at the {older}",
        )
    known = _DECODER_OF.get(data[:end])
    if known is None:
        raise FrameError(
            "unknown", f"expected one of the topics {', '.join(sorted(_CONTENTS))}, got {data[:end]!r}"
        )
    topic, decoder = known
    try:
        message = decoder.decode(memoryview(data)[body:])
        if type(message) is SignalBatch:
            _ = message.table  # looks at every id and number, and is kept for whoever asks
    except Exception as error:
        # The boundary itself: besides msgspec's own errors, hostile bytes can end in RecursionError
        # (deep nesting), MemoryError, UnicodeDecodeError or TypeError (unhashable keys).
        raise FrameError("malformed", f"expected a valid message on {topic}, got: {error}") from error
    return Frame(topic, publisher, sequence, message)


def decode(data: bytes, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """The message in a frame; see :func:`read_frame` for the limits and what is raised."""
    return read_frame(data, max_message_bytes=max_message_bytes).message
