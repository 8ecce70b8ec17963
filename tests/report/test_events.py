from __future__ import annotations

import pytest

from esper.messages import GovernorRecord, RunRecord
from esper.report.events import describe

from .conftest import decision, transition


def _germinate(**fields):
    return decision(120, "s1", site="bypass:fc1->fc2", blueprint="widen", size=16, **fields)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            _germinate(numbers={"score": 3.14159, "floor": 1.2}),
            "germinated widen(16) at bypass:fc1->fc2 — score 3.142 against floor 1.2",
        ),
        (
            _germinate(reason="narrow layer", numbers={"score": 3.0, "floor": 1.2}),
            "germinated widen(16) at bypass:fc1->fc2 — narrow layer (score 3 against floor 1.2)",
        ),
        (
            _germinate(reason="width 4 of 16", numbers={"score": 3.0}),
            "germinated widen(16) at bypass:fc1->fc2 — width 4 of 16",
        ),
        (
            _germinate(reason="narrow", applied=False, refused="budget is spent"),
            "refused to germinate widen(16) at bypass:fc1->fc2 — budget is spent (wanted because: narrow)",
        ),
        (
            decision(1, action="wait", reason="nothing clears its floor", applied=False),
            "waits nothing clears its floor",
        ),
        (decision(1, action="wait", reason="the search is over"), "restarts the search is over"),
        (decision(1, "s1", action="cull", site="s1", reason="no gain"), "culled s1 — no gain"),
        (decision(1, action="recycle", site="fc1", reason="x"), "recycled dormant units of fc1 — x"),
        (
            transition(9, "s1", "training", "blending", reason="loss fell", measurements={"gain": 0.012345}),
            "blending widen at bypass:fc1->fc2 — loss fell (gain 0.01235)",
        ),
        (transition(9, "s1", "holding", "fossilized"), "fossilised widen at bypass:fc1->fc2"),
        (transition(9, "s1", "culled", "embargoed"), "resting bypass:fc1->fc2"),
        (
            GovernorRecord("r", 5, 0, "rollback", "", "loss exploded", {"loss": float("inf")}, 0.0),
            "rolled back (governor) — loss exploded (loss inf)",
        ),
        (RunRecord("r", "start", 0, {"policy": "random", "sites": ["a"]}, 0.0), "started policy random"),
        (
            RunRecord("r", "note", 1, {"sites": ["a", "b"], "refused": {"c": "lazy"}}, 0.0),
            "traced the host: seeds can attach at 2 sites; 1 layers left out",
        ),
    ],
)
def test_one_sentence_an_event(event, text):
    assert describe(event) == text


def test_a_terminal_cannot_be_steered():
    event = transition(1, "s1", "training", "culled", site="fc\x1b[2J\n1", reason="a\tb\r\x07")
    assert describe(event) == "culled widen at fc [2J 1 — a b"
