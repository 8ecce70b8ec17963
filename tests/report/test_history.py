from __future__ import annotations

from esper.messages import GovernorRecord
from esper.report.history import growth_marks, outcomes, parameter_curve, seeds

from .conftest import decision, life, transition


def test_a_seed_goes_through_its_stages(growth_events):
    kept, gone = seeds(growth_events)
    assert kept.label == "widen @ bypass:fc1->fc2 (16)"
    assert [(s.stage, s.start, s.end) for s in kept.segments] == [
        ("germinated", 40, 41), ("training", 41, 70), ("blending", 70, 100), ("holding", 100, 130),
        ("fossilized", 130, None),
    ]  # fmt: skip
    assert (kept.fossilized_at, kept.culled_at) == (130, None)
    assert (gone.site, gone.blueprint, gone.culled_at) == ("parallel:fc3", "bottleneck", 130)
    assert gone.segments[-1].end == 130


def test_outcomes_are_counted(growth_events):
    counts = outcomes(growth_events)
    assert (counts.germinated, counts.fossilized, counts.culled) == (2, 1, 1)
    assert outcomes([]).germinated == 0


def test_the_order_of_decision_and_transition_does_not_matter():
    events = life("s1", 10, 5, 100)
    events[0], events[1] = events[1], events[0]
    (seed,) = seeds(events)
    assert seed.size == 16
    assert [segment.stage for segment in seed.segments][:2] == ["germinated", "training"]


def test_a_seed_grown_by_hand_needs_no_decision():
    (seed,) = seeds([transition(3, "s1", "dormant", "germinated")])
    assert (seed.segments[0].start, seed.size, seed.label) == (3, 0, "widen @ bypass:fc1->fc2")


def test_refused_decisions_make_no_seed():
    assert seeds([decision(3, "", applied=False, site="parallel:fc1", blueprint="widen")]) == []


def test_marks_in_order(growth_events):
    recycle = decision(20, action="recycle", site="fc1")
    rollback = GovernorRecord("run", 60, 1, "rollback", "", "loss exploded", {}, 0.0)
    marks = growth_marks([*growth_events, recycle, rollback])
    assert [(mark.step, mark.kind) for mark in marks] == [
        (20, "recycle"), (40, "germinate"), (60, "rollback"), (90, "germinate"),
        (130, "fossilise"), (130, "cull"),
    ]  # fmt: skip
    assert marks[1].label == "widen 16"


def test_parameters_change_where_events_say_so(growth_events):
    assert parameter_curve(growth_events, 100) == [(0, 100), (40, 150), (90, 200), (130, 150)]
    assert parameter_curve([], 7) == [(0, 7)]
    assert parameter_curve([]) == []
