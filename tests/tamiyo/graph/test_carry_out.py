"""A chosen candidate reaches a real run."""

from __future__ import annotations

import math

import pytest
from graph_states import ProbedLoop, body_of, place, signal, state_of
from loop import EAGER

from esper.errors import GrowthError
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.candidates import candidates
from esper.tamiyo.graph.carry_out import decisions, settled
from esper.tamiyo.graph.facts import WAIT, Candidate
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point


def carry_out(loop: ProbedLoop, candidate: Candidate) -> None:
    for decision in decisions(candidate, policy="test", reason="it was chosen"):
        loop.controller.request(decision)
    loop.run(1)


def test_all_kinds_of_growth_are_carried_out_by_a_controller() -> None:
    found = candidates(ProbedLoop(total_steps=1000).run(3).state)
    assert len(found) >= 12
    for i, candidate in enumerate(found):
        if candidate.action != "grow":
            continue
        loop = ProbedLoop(total_steps=1000).run(3)
        assert candidates(loop.state)[i] == candidate
        before = loop.body.num_parameters
        carry_out(loop, candidate)
        made = loop.decisions[-len(candidate.placements) :]
        assert [(d.applied, d.refused) for d in made] == [(True, "")] * len(candidate.placements)
        assert loop.body.num_parameters == before + candidate.parameters
        assert sorted(s.site.name for s in loop.body.seeds) == sorted(p.site for p in candidate.placements)


def test_hold_and_cull_reach_the_seed() -> None:
    loop = ProbedLoop(total_steps=1000, lifecycle=EAGER | {"min_holding_steps": 40}).run(3)
    carry_out(loop, candidates(loop.state)[1])
    loop.run(12)
    point = decision_point(loop.state, History())
    about = {(c.action, c.seed_id): c for c in point.candidates if c.seed_id}
    assert set(about) == {("cull", "s1"), ("cull", "s2"), ("hold", "s1"), ("hold", "s2")}
    before = loop.body.num_parameters
    carry_out(loop, about["hold", "s2"])
    assert loop.decisions[-1].applied
    carry_out(loop, about["cull", "s1"])
    assert [s.seed_id for s in loop.body.seeds] == ["s2"]
    assert loop.body.num_parameters == before + about["cull", "s1"].parameters
    resting = [c for c in candidates(loop.state) if "embargo" in c.unavailable]
    assert {c.placements[0].site for c in resting} == {"bypass:0->2"}


def test_dormant_units_are_recycled_by_a_controller() -> None:
    loop = ProbedLoop(total_steps=1000)
    loop.model[0].bias.data[:3] = -50.0  # three of six units never fire
    loop.run(1)
    (recycle, *_) = (c for c in candidates(loop.state) if c.action == "recycle")
    assert recycle.placements[0].target == "0"
    carry_out(loop, recycle)
    assert loop.decisions[-1].applied
    assert loop.controller.ledger.recycled == 1


def test_decisions_carry_who_why_and_how_sure() -> None:
    grow = Candidate(action="grow", placements=(place(), place("a", "b", size=7)), parameters=30, flops=60)
    one, two = decisions(
        grow, policy="tamiyo", reason="it pays", confidence=1.2, urgency=0.3, risk=-0.1,
        numbers={"value": 0.5, "left": math.inf},
    )  # fmt: skip
    assert (one.action, one.site, two.site, two.size) == ("germinate", "bypass:in->a", "bypass:a->b", 7)
    assert (one.policy, one.reason, one.confidence, one.urgency, one.risk) == (
        "tamiyo",
        "it pays",
        1.0,
        0.3,
        0.0,
    )
    assert one.numbers == {"value": 0.5, "parameters": 30.0, "forward_flops": 60.0}
    (wait,) = decisions(WAIT, policy="p", reason="nothing pays")
    assert (wait.action, wait.site) == ("wait", "")


def test_what_may_not_be_chosen_or_is_left_open_is_refused() -> None:
    closed = Candidate(action="grow", placements=(place(),), unavailable="the window is closed")
    with pytest.raises(GrowthError, match="cannot be carried out: the window is closed"):
        decisions(closed, policy="p", reason="r")
    with pytest.raises(GrowthError, match="should name site, blueprint and size"):
        decisions(Candidate(action="grow", placements=(place(size=0),)), policy="p", reason="r")


def test_a_candidate_from_signals_alone_is_settled_by_the_run() -> None:
    state = state_of(body_of("mlp"))
    graph = ModelGraphBuilder().build_model_graph([signal("layers.1"), signal("elsewhere")])
    there, elsewhere = (c for c in graph.candidates if c.action == "grow")
    chosen = settled(there, state)
    assert "layers.1" in (chosen.placements[0].source, chosen.placements[0].target)
    assert decisions(chosen, policy="p", reason="r")[0].action == "germinate"
    assert settled(chosen, state) is chosen
    with pytest.raises(GrowthError, match="at layer 'elsewhere', and there is none now"):
        settled(elsewhere, state)
    with pytest.raises(GrowthError, match="is offered, but the growth window is closed"):
        settled(there, state_of(body_of("mlp"), window_open=False))
