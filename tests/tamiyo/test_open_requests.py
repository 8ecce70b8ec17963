"""Requests that name a layer and leave the rest to the run."""

from __future__ import annotations

import pytest
from loop import Loop

from esper.messages import Decision


def ask(loop: Loop, action: str, layer: str, **fields: object) -> None:
    loop.controller.request(Decision(action=action, site=layer, policy="afar", reason="r", **fields))  # type: ignore[arg-type]
    loop.run()


def test_growth_at_a_layer_takes_a_place_and_a_size_that_the_budget_pays() -> None:
    loop = Loop().run(3)
    ask(loop, "germinate", "2")
    record = loop.decisions[-1] if loop.decisions[-1].decision.policy == "afar" else loop.decisions[-2]
    assert record.applied, record.refused
    (seed,) = loop.body.seeds
    assert "2" in (seed.site.source, seed.site.target)
    assert record.decision.site == seed.site.name
    assert record.decision.size == seed.size > 0
    ask(loop, "cull", "2")
    assert not loop.body.seeds


@pytest.mark.parametrize(("action", "match"), [("cull", "expected a seed at layer '2'"), ("hold", "to hold")])
def test_what_is_not_there_is_refused_with_the_reason(action: str, match: str) -> None:
    loop = Loop().run(3)
    ask(loop, action, "2")
    (record,) = [r for r in loop.decisions if r.decision.policy == "afar"]
    assert not record.applied
    assert match in record.refused


def test_a_budget_that_is_used_up_refuses() -> None:
    loop = Loop(budget={"max_parameters_ratio": 1.0}).run(3)
    ask(loop, "germinate", "2")
    (record,) = [r for r in loop.decisions if r.decision.policy == "afar"]
    assert not record.applied
    assert "place to grow at layer '2'" in record.refused
