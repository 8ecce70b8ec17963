"""What happens is written down, published and told, in this order, and no listener can stop it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from loop import Sink

from esper.messages import (
    Decision,
    DecisionRecord,
    ErrorRecoveryEvent,
    GovernorRecord,
    KernelPerformance,
    RunRecord,
    SignalBatch,
    TransitionRecord,
)
from esper.report import Journal, read_journal
from esper.tamiyo.recorder import Recorder


def record_everything(recorder: Recorder) -> None:
    recorder.step, recorder.epoch, recorder.num_parameters = 7, 1, 99
    recorder.decision(
        Decision(action="wait", reason="early", policy="p", numbers={"loss": float("nan")}), applied=False
    )
    recorder.transition(
        seed_id="s1", site="parallel:a", blueprint="lowrank", source="dormant", target="germinated",
        reason="asked", measurements={"x": float("inf")},
    )  # fmt: skip
    recorder.governor(GovernorRecord("run", 7, 1, "cull", "s1", "it exploded", {"loss": 1e9}, 0.0))
    recorder.run(RunRecord("run", "note", 7, {}, 0.0))


def test_events_reach_journal_bus_and_listeners_in_order():
    order: list[str] = []

    class Journalling(Sink):
        def write(self, event: Any) -> None:
            order.append("journal")
            super().write(event)

        def publish(self, message: Any) -> bool:
            order.append("bus")
            return super().publish(message)

    sink = Journalling()
    heard: list[Any] = []
    record_everything(Recorder("run", sink, sink, [heard.append, lambda _: order.append("listener")]))
    assert order[:3] == ["journal", "bus", "listener"]
    assert [type(e) for e in sink.events] == [DecisionRecord, TransitionRecord, GovernorRecord, RunRecord]
    assert heard == sink.events
    assert next(m for m in sink.messages if isinstance(m, ErrorRecoveryEvent)).kind == "cull"
    first = sink.events[0]
    assert isinstance(first, DecisionRecord)
    assert (first.run_id, first.step, first.epoch, first.num_parameters) == ("run", 7, 1, 99)


def test_numbers_that_are_not_finite_survive_the_journal(tmp_path):
    with Journal(tmp_path / "growth.jsonl") as journal:
        record_everything(Recorder("run", journal))
    decision, transition, *_ = read_journal(tmp_path / "growth.jsonl")
    assert decision.decision.numbers["loss"] != decision.decision.numbers["loss"]
    assert transition.measurements["x"] == float("inf")


def test_a_failing_listener_is_reported_once_and_dropped(caplog: pytest.LogCaptureFixture):
    calls: list[int] = []

    def broken(event: Any) -> None:
        calls.append(1)
        raise OSError("the display is gone")

    heard: list[Any] = []
    with caplog.at_level(logging.ERROR):
        record_everything(Recorder("run", None, None, [broken, heard.append]))
    assert len(calls) == 1
    assert len(heard) == 4
    assert len(caplog.records) == 1


def test_telemetry_goes_to_the_bus_alone_and_nowhere_without_one():
    sink = Sink()
    recorder = Recorder("run", sink, sink)
    recorder.signals([])
    recorder.timing(3.0, 0.5)
    assert [type(m) for m in sink.messages] == [SignalBatch, KernelPerformance]
    assert sink.events == []
    silent = Recorder("run")
    silent.signals([])
    record_everything(silent)
