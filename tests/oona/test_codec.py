"""Frames: round trip, and nothing but MessageError for anything else."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper.errors import MessageError
from esper.messages import SCHEMA_VERSION, TOPICS, Command, Decision, RunRecord, SignalBatch
from esper.oona import decode, encode
from esper.oona.codec import FrameError, read_frame, topic_of

RECORD = RunRecord("r", "note", 3, {"a": 1}, 1.0)
PREFIX = TOPICS["growth"].encode() + b"\0"
HEADER = struct.Struct("!4sH8sQ")


def frame_of(payload: bytes, *, topic: str = TOPICS["growth"], version: int = SCHEMA_VERSION) -> bytes:
    return topic.encode() + b"\0" + HEADER.pack(b"ESPR", version, bytes(8), 0) + payload


def kind_of(data: bytes, **limits: int) -> str:
    with pytest.raises(FrameError) as caught:
        read_frame(data, **limits)
    return caught.value.kind


def test_a_frame_carries_topic_sender_sequence_and_message(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch()
    frame = read_frame(encode(batch, publisher=b"12345678", sequence=41))
    assert frame == (TOPICS["health"], b"12345678", 41, batch)
    assert decode(encode(RECORD)) == RECORD


def test_a_subscription_to_the_topic_matches_the_frame(make_batch) -> None:  # type: ignore[no-untyped-def]
    assert encode(make_batch()).startswith(TOPICS["health"].encode())


@pytest.mark.parametrize(
    ("version", "match"), [(SCHEMA_VERSION - 1, "at the sender"), (SCHEMA_VERSION + 1, "at the reader")]
)
def test_other_versions_are_refused_with_who_must_upgrade(version: int, match: str) -> None:
    with pytest.raises(MessageError, match=match) as caught:
        decode(frame_of(msgspec.msgpack.encode(RECORD), version=version))
    assert caught.value.kind == "version"  # type: ignore[attr-defined]


def test_size_limit_counts_the_whole_frame() -> None:
    data = encode(RECORD)
    assert decode(data, max_message_bytes=len(data)) == RECORD
    with pytest.raises(MessageError, match=f"at most {len(data) - 1} bytes, got {len(data)}"):
        decode(data, max_message_bytes=len(data) - 1)
    assert kind_of(data, max_message_bytes=10) == "oversized"


def test_an_unknown_topic_is_told_apart() -> None:
    assert kind_of(frame_of(b"\x80", topic="telemetry.weather")) == "unknown"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x80",
        msgspec.msgpack.encode(RECORD)[:-1],
        msgspec.msgpack.encode(RECORD) + b"\x00",
        msgspec.msgpack.encode({"type": "no_such_type"}),
        msgspec.msgpack.encode(Command("r", "c", Decision(action="wait", reason="", policy=""), 1.0)),
        b"\x85" + msgspec.msgpack.encode({"type": "run", "run_id": "a", "event": "note", "step": 1})[1:]
        + b"\xa4info" + b"\x81\xa1a" + b"\x91" * 100_000,  # nested deeper than the interpreter's stack
        b"\xdf\xff\xff\xff\xff",  # announces four billion entries
        b"\x82\xa4type\xa3run\xa6run_id\xa2\xff\xff",  # not UTF-8
    ],
)  # fmt: skip
def test_malformed_payloads(payload: bytes) -> None:
    assert kind_of(frame_of(payload)) == "malformed"


@pytest.mark.parametrize(
    "data", [b"", b"\0", PREFIX, PREFIX + b"ESPR", b"x" * 100_000, PREFIX + b"FAKE" + bytes(60)]
)
def test_malformed_headers(data: bytes) -> None:
    assert kind_of(data) == "malformed"


def test_a_signal_out_of_range_spoils_its_batch(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch()
    bad = msgspec.structs.replace(batch.signals[1], health_score=2.0)
    with pytest.raises(MessageError, match=r"health_score in \[0, 1\], got 2 for layer 'net\.fc2'"):
        decode(encode(SignalBatch.of("r", 1, 1, [batch.signals[0], bad], 1.0)))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
@example(PREFIX)
def test_arbitrary_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


@settings(deadline=None, max_examples=500)
@given(topic=st.sampled_from(sorted(TOPICS.values())), payload=st.binary(max_size=200))
def test_arbitrary_payloads_raise_nothing_else(topic: str, payload: bytes) -> None:
    with pytest.raises(MessageError):
        decode(frame_of(payload, topic=topic))


def _mutations() -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=500)
@given(changes=_mutations(), cut=st.integers(0, 400))
def test_damaged_frames_give_a_message_or_a_message_error(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(encode(SignalBatch.of("r", 1, 1, [], 1.0)) + encode(RECORD))
    data = bytearray(encode(RECORD)) if cut % 2 else data
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: len(data) - cut] if cut < len(data) else data
    try:
        message = decode(bytes(data))
    except MessageError:
        return
    assert topic_of(message) in TOPICS.values()


def test_what_is_no_message_cannot_be_sent() -> None:
    with pytest.raises(MessageError, match=r"messages of esper\.messages, got dict"):
        encode({"a": 1})  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="cannot be written as MessagePack"):
        encode(RunRecord("r", "note", 1, {"object": object()}, 1.0))
