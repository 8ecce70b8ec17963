"""What a run remembers, and the decision points made of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from graph_states import ProbedLoop, body_of, signal, state_of

from esper.errors import CheckpointError, ConfigError
from esper.messages import Decision
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.state import SeedView


def test_signals_are_kept_a_layer_within_the_window_oldest_first() -> None:
    history = History(window=3)
    for step in range(5):
        history.extend([signal("b", step), signal("a", step)])
    assert [(s.step, s.layer_id) for s in history.signals] == [
        (step, name) for step in (2, 3, 4) for name in ("b", "a")
    ]
    history.extend([signal("a", 3)])  # the run went back to a snapshot
    assert [s.step for s in history.signals if s.layer_id == "a"] == [2, 3]


def test_a_deep_host_keeps_fewer_steps_but_every_layer() -> None:
    history = History(max_signals=10)
    for step in range(6):
        history.extend(signal(str(i), step) for i in range(4))
    assert [s.step for s in history.signals if s.layer_id == "0"] == [4, 5]
    history.extend(signal(str(i), 7) for i in range(50))
    assert {s.layer_id for s in history.signals} == {str(i) for i in range(50)}


def test_culled_seeds_are_forgotten() -> None:
    body = body_of("mlp")
    seed = SeedView("s0", body.sites[0].name, "lowrank", 2, "training", None)
    health = {"layers.0": signal("layers.0"), "layers.0/s0": signal("layers.0", 0, "s0")}
    history = History()
    history.note(state_of(body, health=health, seeds=[seed]))
    assert [s.seed_id for s in history.signals] == ["", "s0"]
    history.note(state_of(body, health=health))
    assert [s.seed_id for s in history.signals] == [""]


def test_losses_are_kept_at_decision_points_when_they_are_numbers() -> None:
    state, history = state_of(body_of("mlp")), History(max_losses=2)
    for step, loss in ((1, float("nan")), (2, 3.0), (2, 2.5), (3, 2.0), (4, 1.0)):
        history.note(dataclasses.replace(state, step=step, train_loss=loss))
    assert (history.steps, history.train_losses) == ((3, 4), (2.0, 1.0))


def test_a_resumed_history_goes_on_as_if_nothing_had_happened() -> None:
    loop, history, again = ProbedLoop(total_steps=200), History(), History()
    for _ in range(4):
        history.note(loop.run(2).state)
    history.note_decisions([Decision(action="recycle", reason="asleep", policy="p", site="0")], 8)
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    state = loop.run(2).state
    one, two = (decision_point(state, h) for h in (history, again))
    assert (one.run, one.signals, one.candidates) == (two.run, two.signals, two.candidates)
    assert again.recycled == {"0": 8}
    assert len(one.signals) == 15  # three layers, five sampled steps


def test_a_state_that_is_none_is_refused_and_changes_nothing() -> None:
    history = History()
    history.extend([signal()])
    for wrong in ({}, {"signals": [[["a"]]], "losses": [], "recycled": {}}):
        with pytest.raises(CheckpointError, match="expected the state of a History"):
            history.load_state_dict(wrong)
    assert len(history.signals) == 1
    with pytest.raises(ConfigError, match="at least 1, got 0, 4096 and 100"):
        History(window=0)


def test_a_point_tells_the_run() -> None:
    loop, history = ProbedLoop(total_steps=200), History()
    state = loop.run(6).state
    point = decision_point(state, history, run_id="r1", price=0.3)
    run = point.run
    assert (run.run_id, run.step, run.total_steps, run.price) == ("r1", 6, 200, 0.3)
    assert run.host_parameters == run.num_parameters == loop.body.num_parameters
    assert run.held_out_loss == pytest.approx(loop.held_out()[0]().item(), rel=1e-5)
    assert point.topology is loop.body.topology
    assert {s.layer_id for s in point.signals} == {"0", "2", "4"}


def test_the_held_out_loss_is_not_paid_for_where_nothing_can_grow() -> None:
    loop = ProbedLoop(total_steps=200).run(2)
    spent = loop.controller.ledger.measuring_flops
    closed = dataclasses.replace(loop.state, window_open=False)
    assert decision_point(closed, History()).run.held_out_loss is None
    assert decision_point(loop.state, History(), measure=False).run.held_out_loss is None
    assert loop.controller.ledger.measuring_flops == spent


def test_the_same_run_gives_the_same_points_and_graphs() -> None:
    points = [decision_point(ProbedLoop(total_steps=200).run(5).state, History()) for _ in range(2)]
    assert points[0].run == points[1].run
    assert points[0].candidates == points[1].candidates
    one, two = (ModelGraphBuilder().build(point).graph_data for point in points)
    assert one.x.equal(two.x)
    assert one.candidate_attr.equal(two.candidate_attr)
