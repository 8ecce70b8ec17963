"""Fixed rules as choosers: the candidate that each takes on a host made by hand.

Candidates: 0 WAIT, 1 and 2 the narrow layer (6 units) by 4 and 16, 3 the wide one (24), 4 both, 5 the way around,
6 recycling of the wide layer, 7 closed.
"""

from __future__ import annotations

import msgspec
import pytest
from oracle_states import chain, make_point

from esper.messages import Stage
from esper.tamiyo.graph.facts import WAIT, DecisionPoint, SeedFacts
from esper.tamiyo.oracle.rules import RULES


def choice(point: DecisionPoint, name: str, options: str) -> int:
    return {rule.options: rule for rule in RULES[name]}[options].choose(point)


@pytest.mark.parametrize(
    ("name", "options", "chosen"),
    [
        ("wait", "", 0),
        ("narrowest", "size=small", 1),
        ("narrowest", "size=large", 2),
        ("cond", "size=large, ratio=0.2", 0),  # 6 units against a median of 15 are .4
        ("cond", "size=small, ratio=0.5", 1),
        ("shortcut", "size=small, prefer=shortcut, least_layers=0", 5),
        ("shortcut", "size=small, prefer=widen, least_layers=0", 5),
        ("shortcut", "size=large, prefer=shortcut, least_layers=4", 0),
        ("dimensions", "size=large", 2),  # 65 x 24 against 7 x 10
        ("uniform", "size=large", 4),
        ("tokens_per_parameter", "size=large, above=60.0", 0),
        ("recycle", "above=0.1", 0),
        ("expressivity", "size=large, least_share=0.025", 5),
    ],
)
def test_choices(name: str, options: str, chosen: int) -> None:
    assert choice(make_point(), name, options) == chosen


def test_transformers_go_by_tokens_per_parameter() -> None:
    point = make_point(transformer=True, tokens_per_parameter=150.0)
    assert choice(point, "tokens_per_parameter", "size=small, above=110.0") == 4
    assert choice(point, "tokens_per_parameter", "size=small, above=200.0") == 0
    assert choice(point, "expressivity", "size=small, least_share=0.1") == 4
    one_block = msgspec.structs.replace(point, candidates=point.candidates[:4])
    assert choice(one_block, "tokens_per_parameter", "size=large, above=110.0") == 2


def test_the_way_around_begins_at_the_input_where_it_can() -> None:
    point = make_point()
    rule = "size=large, prefer=shortcut, least_layers=0"
    place = msgspec.structs.replace(point.candidates[5].placements[0], site="bypass:1->2", source="1")
    later = msgspec.structs.replace(point.candidates[5], placements=(place,))
    both = msgspec.structs.replace(point, candidates=(WAIT, later, *point.candidates[1:]))
    assert choice(both, "shortcut", rule) == 6
    assert choice(msgspec.structs.replace(point, candidates=(WAIT, later)), "shortcut", rule) == 1
    place = msgspec.structs.replace(point.candidates[5].placements[0], blueprint="widen", size=8)
    units = msgspec.structs.replace(point.candidates[5], placements=(place,))
    either = msgspec.structs.replace(point, candidates=(*point.candidates[:7], units))
    assert choice(either, "shortcut", rule) == 5
    assert choice(either, "shortcut", "size=large, prefer=widen, least_layers=0") == 7


def test_sleeping_layers_are_recycled() -> None:
    point = make_point(dormancy=0.4)
    assert choice(point, "recycle", "above=0.3") == 6
    assert choice(point, "recycle", "above=0.5") == 0
    assert choice(point, "expressivity", "size=large, least_share=0.0") == 6


def test_grown_units_count_as_width() -> None:
    stage: Stage = "fossilized"
    seed = SeedFacts(
        seed_id="s1", site="bypass:0->1", source="0", target="1", blueprint="widen", size=30, stage=stage,
        contribution=None,
    )  # fmt: skip
    assert choice(make_point(seeds=(seed,)), "narrowest", "size=large") == 3


def test_random_draws_every_available_growth() -> None:
    drawn = {RULES["random"][0].choose(make_point(f"run {index}")) for index in range(100)}
    assert drawn == {1, 2, 3, 4, 5}
    assert RULES["random"][0].choose(make_point()) == RULES["random"][0].choose(make_point())


def test_every_rule_waits_where_nothing_is_offered() -> None:
    point = msgspec.structs.replace(
        make_point(dormancy=0.9, transformer=True, tokens_per_parameter=1e3), candidates=(WAIT,)
    )
    for variants in RULES.values():
        assert {rule.choose(point) for rule in variants} == {0}


def test_without_scores_expressivity_goes_by_shape() -> None:
    point = make_point()
    bare = tuple(
        msgspec.structs.replace(
            candidate,
            placements=tuple(
                msgspec.structs.replace(p, score=None, score_excess=None, score_z=None)
                for p in candidate.placements
            ),
        )
        for candidate in point.candidates
    )
    rule = "size=large, least_share=0.025"
    unscored = msgspec.structs.replace(point, candidates=bare)
    assert choice(unscored, "expressivity", rule) == 5  # 6 units between 64 and 24 are a neck: lead around it
    no_way = msgspec.structs.replace(unscored, candidates=bare[:5])
    assert choice(no_way, "expressivity", rule) == 2  # or widen it
    wide = chain((64, 48, 24, 10))
    assert choice(msgspec.structs.replace(no_way, topology=wide), "expressivity", rule) == 0
    scored = msgspec.structs.replace(point, candidates=point.candidates[:5])
    assert choice(scored, "expressivity", rule) == 0  # .4 of 24 directions
    assert choice(scored, "expressivity", "size=large, least_share=0.0") == 2
