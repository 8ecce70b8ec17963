"""What runs and the service say to each other: round trips, and whatever else may arrive."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_points import make_candidates, make_point, make_topology

from esper.errors import MessageError
from esper.oona.codec import FrameError
from esper.tamiyo.graph.facts import Candidate, DecisionPoint, Placement
from esper.tamiyo.service.protocol import (
    Answer,
    Ask,
    Beat,
    BeatBack,
    Busy,
    Hello,
    Leave,
    Left,
    Noted,
    Refusal,
    Report,
    Welcome,
    check_point,
    read_reply,
    read_request,
    topology_hash,
    write,
)

ASK = Ask(run_id="run", request_id="run:10", sequence=1, point=make_point())
REQUESTS = [
    Hello(run_id="run", topology=topology_hash(make_topology())),
    ASK,
    Report(run_id="run", request_id="run:10", applied=False, refused="no room"),
    Beat(run_id="run", number=3),
    Leave(run_id="run"),
]
REPLIES = [
    Welcome(
        run_id="run", service_id="s", decider="cond", heartbeat_s=1.0, expiry_s=9.0, max_message_bytes=1024
    ),
    Answer(
        run_id="run", request_id="run:10", sequence=1, candidate=0, confidence=0.5, uncertainty=0.1, value=-0.2,
        urgency=0.0, risk=0.1, reason="later", decider="cond", preferred=2, gate="cooldown", abstained=True,
    ),
    Busy(run_id="run", request_id="run:10", retry_after_ms=5, waiting=9),
    BeatBack(run_id="run", number=3, service_id="s", registered=True),
    Noted(run_id="run", request_id="run:10"),
    Left(run_id="run"),
    Refusal(cause="order", reason="late"),
]  # fmt: skip


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_requests_come_through_as_they_are(message: object) -> None:
    assert read_request(write(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_replies_come_through_as_they_are(message: object) -> None:
    assert read_reply(write(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        (b"", "malformed", "header of 6 bytes, got 0"),
        (b"HTTP/1.1 200 OK", "malformed", "no esper run or service"),
        (write(ASK)[:-1], "malformed", "valid message"),
        (b"ESPT\x00\x09" + write(ASK)[6:], "version", "expected protocol version 1, got 9.*at the reader"),
        (write(REPLIES[0]), "malformed", "Invalid value 'welcome'"),
        (write(ASK) + b" " * 5000, "oversized", "at most 4000 bytes"),
    ],
)
def test_what_is_no_request_is_refused_with_the_ground(data: bytes, kind: str, match: str) -> None:
    with pytest.raises(FrameError, match=match) as refused:
        read_request(data, max_message_bytes=4000 if kind == "oversized" else 1 << 20)
    assert refused.value.kind == kind


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_hostile_bytes_raise_nothing_else(payload: bytes) -> None:
    for read in (read_request, read_reply):
        for data in (payload, b"ESPT\x00\x01" + payload):
            with pytest.raises(FrameError):
                read(data)


def _with(**changes: object) -> DecisionPoint:
    return msgspec.structs.replace(make_point(), **changes)


@pytest.mark.parametrize(
    ("point", "match"),
    [
        (make_point("other"), "about run 'other' and was sent by 'run'"),
        (_with(candidates=()), "first candidate is not WAIT"),
        (_with(candidates=make_candidates(make_topology())[1:]), "first candidate is not WAIT"),
        (_with(topology=make_topology((3, 4))), "layers that its topology does not have: net.1"),
        (
            _with(candidates=(*make_point().candidates, Candidate(action="grow", placements=(
                Placement(site="s", source="net.0", target="../etc"),)))),
            "does not have: ../etc",
        ),
        (_with(run=msgspec.structs.replace(make_point().run, steps=(1,))), "1 steps and 5 losses"),
    ],
)  # fmt: skip
def test_points_that_contradict_themselves_are_refused(point: DecisionPoint, match: str) -> None:
    check_point(make_point(), "run")
    with pytest.raises(MessageError, match=match):
        check_point(point, "run")


def test_hosts_are_told_apart_by_their_topology() -> None:
    assert topology_hash(make_topology()) == topology_hash(make_topology())
    assert topology_hash(make_topology()) != topology_hash(make_topology((16, 5, 16, 16, 3)))
