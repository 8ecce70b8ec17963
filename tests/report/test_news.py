from __future__ import annotations

from esper.messages import GovernorRecord, RunRecord
from esper.report.news import NewsFilter

from .conftest import decision, transition


def _told(events):
    news = NewsFilter()
    return [told for event in events for told in news.feed(event)] + news.flush()


def _birth(seed_id, step=10):
    """In the order of the controller: the decision comes after what it caused."""
    return [
        transition(step, seed_id, "dormant", "germinated"),
        transition(step, seed_id, "germinated", "training"),
        decision(step, seed_id, blueprint="widen"),
    ]


def test_a_birth_is_told_by_its_decision_then_by_what_followed():
    germinated, training, made = _birth("s1")
    assert _told([germinated, training, made]) == [made, training]
    assert _told([made, germinated, training]) == [made, training]


def test_two_births_in_one_step():
    first, second = _birth("s1"), _birth("s2")
    assert _told([*first, *second]) == [first[2], first[1], second[2], second[1]]


def test_a_seed_grown_by_hand_is_told_when_the_next_thing_happens_or_at_the_end():
    by_hand = transition(10, "s1", "dormant", "germinated")
    other = RunRecord("run", "note", 11, {}, 0.0)
    assert _told([by_hand, other]) == [by_hand, other]
    assert _told([by_hand]) == [by_hand]


def test_waiting_and_resting_are_no_news_but_a_restart_is():
    restart = decision(9, action="wait", reason="the search is over")
    assert _told([
        decision(1, action="wait", applied=False),
        transition(2, "s1", "culled", "embargoed"),
        transition(3, "s1", "embargoed", "dormant"),
        restart,
    ]) == [restart]  # fmt: skip


def test_a_death_is_told_once():
    death = transition(30, "s1", "training", "culled")
    by_governor = GovernorRecord("run", 30, 0, "cull", "s1", "not finite", {}, 0.0)
    by_policy = decision(30, "", action="cull", site="s1")
    assert _told([by_governor, death]) == [by_governor]
    assert _told([death, by_policy]) == [death]


def test_refusals_are_told_each_time():
    refused = decision(5, applied=False, refused="budget")
    assert _told([refused, refused]) == [refused, refused]
