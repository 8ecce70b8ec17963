"""What a training run and the service say to each other, and how it travels.

One ZeroMQ part is one message: magic ``ESPT``, version u16 (big-endian), then one of the tagged structs below as
MessagePack. A run asks from a ``DEALER``, the service answers from a ``ROUTER``. Everything that arrives is
untrusted: :func:`read_request` and :func:`read_reply` return a validated message or raise
:class:`~esper.oona.codec.FrameError`, whatever the bytes are.

A request is known by its ``request_id``: sent again, it gets the stored answer and no second decision. A run's
requests are answered in the order of their ``sequence``.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from esper.errors import MessageError
from esper.kasmina.topology import ModelTopology
from esper.messages import Count, Fraction, NonNegative
from esper.oona.codec import MAX_MESSAGE_BYTES, FrameError
from esper.tamiyo.graph.facts import FACTS_VERSION, DecisionPoint

__all__ = [
    "PROTOCOL_VERSION",
    "Answer",
    "Ask",
    "Beat",
    "BeatBack",
    "Busy",
    "Cause",
    "Hello",
    "Leave",
    "Left",
    "Noted",
    "Refusal",
    "Reply",
    "Report",
    "Request",
    "Welcome",
    "check_point",
    "read_reply",
    "read_request",
    "topology_hash",
    "write",
]

PROTOCOL_VERSION = 1
"""Counts changes of the structs of this module."""

Name = Annotated[str, Meta(min_length=1, max_length=160)]
Text = Annotated[str, Meta(max_length=4096)]
Hash = Annotated[str, Meta(min_length=16, max_length=64)]

Cause = Literal[
    "malformed", "oversized", "version", "unregistered", "topology", "order", "invalid", "undecided", "unstored",
    "full", "stopping",
]  # fmt: skip
"""Why something was refused: not a message; too large; of another version; from a run that has not said hello, or
that has expired; of another topology than it said; older than what was asked before; a decision point that contradicts
itself, or a report on a decision that was never made; the decider failed on it; the store could not write it down; as
many runs as there may be; sent to a service that is ending."""


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """A run registers, or registers again after either side was lost; ``sequence`` begins anew."""

    run_id: Name
    topology: Hash
    facts_version: Count = FACTS_VERSION


class Ask(msgspec.Struct, tag="ask", frozen=True, kw_only=True):
    """A decision point to be decided; ``sequence`` rises from one request of a run to its next.

    ``training_flops`` is what the run has cost so far: outcomes are judged by it.
    """

    run_id: Name
    request_id: Name
    sequence: Count
    point: DecisionPoint
    training_flops: NonNegative = 0.0


class Report(msgspec.Struct, tag="report", frozen=True, kw_only=True):
    """What became of an answer.

    ``applied`` may be False because the run refused it (``refused`` says why) or because it came too late.
    ``step`` is when, ``seed_ids`` are the seeds that it planted.
    """

    run_id: Name
    request_id: Name
    applied: bool
    refused: Text = ""
    step: Count = 0
    seed_ids: tuple[str, ...] = ()


class Beat(msgspec.Struct, tag="beat", frozen=True, kw_only=True):
    """A run lives; ``number`` comes back."""

    run_id: Name
    number: Count


class Leave(msgspec.Struct, tag="leave", frozen=True, kw_only=True):
    """A run has ended."""

    run_id: Name


class Welcome(msgspec.Struct, tag="welcome", frozen=True, kw_only=True):
    """The run is known from now on.

    Attributes:
        run_id: Of the run.
        service_id: Drawn anew at every start of the service.
        decider: Who decides.
        heartbeat_s: How often the run should be heard, at the latest.
        expiry_s: After which silence it is forgotten.
        max_message_bytes: Longer requests are refused.
    """

    run_id: Name
    service_id: Name
    decider: Text
    heartbeat_s: NonNegative
    expiry_s: NonNegative
    max_message_bytes: Count


class Answer(msgspec.Struct, tag="answer", frozen=True, kw_only=True):
    """The decision.

    Attributes:
        run_id: Of the run.
        request_id: Of the request.
        sequence: Of the request.
        candidate: Index into the point's candidates; 0 is WAIT.
        confidence: In the choice, in [0, 1].
        uncertainty: Epistemic, in [0, 1]; 0 where the decider knows none.
        value: Expected utility at the end of the run, in nats, where the decider knows one.
        urgency: Expected cost of waiting one decision interval, in nats.
        risk: Chance of a cull or rollback, in [0, 1].
        reason: Why, in words.
        decider: Who decided.
        version: Of its weights; empty where there is one only.
        logprob: Natural logarithm of the probability with which it chose; 0 when it draws nothing.
        preferred: What the decider had chosen before the gates.
        gate: Which gate turned it into WAIT; empty when none did.
        abstained: The decider did not trust itself and fell back.
    """

    run_id: Name
    request_id: Name
    sequence: Count
    candidate: Count
    confidence: Fraction
    uncertainty: Fraction
    value: float
    urgency: NonNegative
    risk: Fraction
    reason: Text
    decider: Text
    preferred: Count
    version: Text = ""
    logprob: float = 0.0
    gate: Text = ""
    abstained: bool = False


class Busy(msgspec.Struct, tag="busy", frozen=True, kw_only=True):
    """The queue is full: ask again after ``retry_after_ms``, or not at all."""

    run_id: Name
    request_id: Name
    retry_after_ms: Count
    waiting: Count


class BeatBack(msgspec.Struct, tag="beat_back", frozen=True, kw_only=True):
    """The service lives; ``registered`` is False when the run has to say hello again."""

    run_id: Name
    number: Count
    service_id: Name
    registered: bool


class Noted(msgspec.Struct, tag="noted", frozen=True, kw_only=True):
    """A report is stored."""

    run_id: Name
    request_id: Name


class Left(msgspec.Struct, tag="left", frozen=True, kw_only=True):
    """The run is forgotten, as it asked."""

    run_id: Name


class Refusal(msgspec.Struct, tag="refusal", frozen=True, kw_only=True):
    """The request cannot be served; repeating it unchanged would not help, except as ``cause`` says."""

    cause: Cause
    reason: Text
    run_id: str = ""
    request_id: str = ""


Request = Hello | Ask | Report | Beat | Leave
Reply = Welcome | Answer | Busy | BeatBack | Noted | Left | Refusal

_HEADER = struct.Struct("!4sH")
_MAGIC = b"ESPT"
_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS = msgspec.msgpack.Decoder(Request)
_REPLIES = msgspec.msgpack.Decoder(Reply)
_MessageT = TypeVar("_MessageT")


def write(message: Request | Reply) -> bytes:
    """The frame of a message."""
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION) + _ENCODER.encode(message)


def read_request(data: bytes, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Request:
    """Read what a run has sent.

    Raises:
        FrameError: with the ground in ``kind``; nothing else is raised, whatever the bytes.
    """
    request: Request = _read(data, _REQUESTS, max_message_bytes)
    return request


def read_reply(data: bytes, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> Reply:
    """Read what a service has sent.

    Raises:
        FrameError: with the ground in ``kind``; nothing else is raised, whatever the bytes.
    """
    reply: Reply = _read(data, _REPLIES, max_message_bytes)
    return reply


def topology_hash(topology: ModelTopology) -> str:
    """Tells hosts apart: SHA-256 of the traced topology, in hexadecimal."""
    return hashlib.sha256(_ENCODER.encode(topology)).hexdigest()


def check_point(point: DecisionPoint, run_id: str) -> None:
    """Check what the types of a decision point cannot say.

    Raises:
        MessageError: It contradicts itself, or is another run's.
    """
    problems = []
    if point.run.run_id != run_id:
        problems.append(f"it is about run {point.run.run_id!r} and was sent by {run_id!r}")
    if not point.candidates or point.candidates[0].action != "wait" or point.candidates[0].unavailable:
        problems.append("its first candidate is not WAIT")
    names = set(point.topology.layer_names)
    if len(names) != len(point.topology.layers):
        problems.append("two layers have one name")
    if not names:
        problems.append("its topology has no layers")
    ends = {end for edge in point.topology.edges for end in (edge.source, edge.target)}
    places = {end for c in point.candidates for place in c.placements for end in (place.source, place.target)}
    if unknown := sorted((ends | places) - names - {""})[:3]:
        problems.append(f"it speaks of layers that its topology does not have: {', '.join(unknown)}")
    if len(point.run.steps) != len(point.run.train_losses):
        problems.append(f"{len(point.run.steps)} steps and {len(point.run.train_losses)} losses")
    if problems:
        raise MessageError(f"expected a decision point that fits together, but {'; '.join(problems)}")


def _read(data: bytes, decoder: Any, max_message_bytes: int) -> Any:
    if len(data) > max_message_bytes:
        raise FrameError(
            "oversized",
            f"expected a message of at most {max_message_bytes} bytes, got {len(data)}: "
            "raise max_message_bytes of the service, or keep fewer signals in the run's history",
        )
    if len(data) < _HEADER.size:
        raise FrameError("malformed", f"expected a header of {_HEADER.size} bytes, got {len(data)} bytes")
    magic, version = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError(
            "malformed",
            f"expected the magic bytes {_MAGIC!r}, got {magic!r}: the sender is no esper run or service",
        )
    if version != PROTOCOL_VERSION:
        raise FrameError(
            "version",
            f"expected protocol version {PROTOCOL_VERSION}, got {version}: upgrade esper at the "
            f"{'sender' if version < PROTOCOL_VERSION else 'reader'}",
        )
    try:
        return decoder.decode(memoryview(data)[_HEADER.size :])
    except Exception as error:
        # The boundary itself: hostile bytes can end in RecursionError, MemoryError, UnicodeDecodeError or TypeError.
        raise FrameError(
            "malformed", f"expected a valid message of a run or a service, got: {error}"
        ) from error
