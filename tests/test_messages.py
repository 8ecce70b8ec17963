"""The wire vocabulary: every type round-trips, in both encodings, and wrong values are refused."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from esper.messages import (
    STAGES,
    TOPICS,
    CacheHitRates,
    Command,
    CommandReply,
    Decision,
    DecisionRecord,
    ErrorRecoveryEvent,
    Event,
    GovernorRecord,
    HealthSignal,
    KernelPerformance,
    Message,
    ModelPerformance,
    RunRecord,
    SignalBatch,
    Stage,
    TransitionRecord,
)


def signal(**changes: object) -> HealthSignal:
    values: dict[str, object] = {
        "layer_id": "net.fc1", "seed_id": "", "chunk_id": 0, "epoch": 1, "step": 10,
        "activation_variance": 0.5, "dead_neuron_ratio": 0.25, "dormancy": 0.125, "avg_correlation": -0.5,
        "effective_rank": 3.0, "gradient_norm": 0.01, "gradient_snr": 2.0, "update_ratio": 1e-3,
        "expressivity": 0.1, "is_ready_for_transition": False, "health_score": 0.75,
        "execution_latency": 0.2, "error_count": 0, "active_seeds": 1, "total_seeds": 2, "timestamp": 1.5,
    }  # fmt: skip
    return HealthSignal(**{**values, **changes})  # type: ignore[arg-type]


DECISION = Decision(
    action="germinate", reason="score 0.2 above 0.1", policy="expressivity", site="bypass:fc1->fc2",
    blueprint="widen", size=8, numbers={"score": 0.2},
)  # fmt: skip
ONE_OF_EACH: list[Message] = [
    SignalBatch.of("r", 10, 1, [signal(), signal(seed_id="s1")], 1.5),
    KernelPerformance("r", 10, 1.25, 0.125, 1.5),
    CacheHitRates("r", 10, 3, 4, 1.5),
    ErrorRecoveryEvent("r", 10, "net.fc1", "nonfinite_seed", "NaN in the output", 1.5),
    ModelPerformance("r", 10, 1, 100, 0.5, None, 1000, 2e9, 1, 1.5),
    Command("r", "c1", DECISION, 1.5),
    CommandReply("c1", False, "another run"),
    DecisionRecord("r", 10, 1, DECISION, True, "", "s1", 1000, 1.5),
    TransitionRecord("r", 10, 1, "s1", "bypass:fc1->fc2", "widen", "training", "blending", "ok", {"age": 5.0},
                     1000, 1.5),
    GovernorRecord("r", 10, 1, "rollback", "s1", "loss exploded", {"loss": 50.0}, 1.5),
    RunRecord("r", "start", 0, {"torch": "2.13", "sites": ["parallel:fc1"]}, 1.5),
]  # fmt: skip


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
def test_round_trips_through_msgpack(message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=Message) == message


@pytest.mark.parametrize(
    "event",
    [m for m in ONE_OF_EACH if isinstance(m, get_args(Event))],
    ids=lambda event: type(event).__name__,
)
def test_events_round_trip_through_a_json_line(event: Event) -> None:
    line = msgspec.json.encode(event)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Event) == event


def test_one_of_each_covers_the_vocabulary() -> None:
    assert {type(message) for message in ONE_OF_EACH} == set(get_args(Message))
    assert set(get_args(Event)) <= set(get_args(Message))


def test_stages_and_topics() -> None:
    assert get_args(Stage) == STAGES
    assert len(set(TOPICS.values())) == len(TOPICS)
    assert TOPICS["health"] == "telemetry.layer.health_signals"
    assert TOPICS["commands"] == "control.kasmina.commands"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"health_score": 1.01}, "<= 1"),
        ({"dead_neuron_ratio": -0.1}, ">= 0"),
        ({"avg_correlation": -1.5}, ">= -1"),
        ({"activation_variance": -1.0}, ">= 0"),
        ({"gradient_norm": float("nan")}, ">= 0"),
        ({"error_count": -1}, ">= 0"),
        ({"layer_id": 3}, "Expected `str`"),
    ],
)
def test_out_of_range_signals_are_refused(changes: dict[str, object], match: str) -> None:
    data = msgspec.msgpack.encode(signal(**changes))
    with pytest.raises(msgspec.ValidationError, match=match):
        msgspec.msgpack.decode(data, type=HealthSignal)


def test_an_unknown_action_is_refused() -> None:
    data = msgspec.msgpack.encode({"action": "explode", "reason": "", "policy": "p"})
    with pytest.raises(msgspec.ValidationError, match="explode"):
        msgspec.msgpack.decode(data, type=Decision)
