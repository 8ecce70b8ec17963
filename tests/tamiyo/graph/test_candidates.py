"""What is offered on real hosts, within which budgets, and in which order."""

from __future__ import annotations

import dataclasses
import time

import pytest
from graph_states import ProbedLoop, body_of, chain_of, signal, state_of

from esper.errors import ConfigError
from esper.kasmina.expressivity import SiteScore
from esper.tamiyo.graph.candidates import CandidateConfig, candidates
from esper.tamiyo.graph.facts import WAIT, Candidate
from esper.tamiyo.graph.plan import HostPlan
from esper.tamiyo.state import SeedView, SiteView

FAMILIES = ("mlp", "cnn", "gpt")


def grown(found: tuple[Candidate, ...]) -> list[Candidate]:
    return [c for c in found if c.action == "grow" and not c.unavailable]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_candidate_fits_the_budget_and_costs_what_it_says(family: str) -> None:
    body = body_of(family)
    left = body.topology.num_parameters // 2
    state = state_of(body, parameters_left=left)
    found = candidates(state)
    assert found[0] == WAIT
    assert len(found) == len({(c.action, c.placements) for c in found})
    assert len(grown(found)) >= 5
    for candidate in grown(found):
        costs = [state.cost(p.site, p.blueprint, p.size) for p in candidate.placements]
        assert candidate.parameters == sum(c.parameters for c in costs) <= left
        assert candidate.flops == sum(c.flops for c in costs)
        if candidate.placements[0].blueprint in ("widen", "conv_widen"):
            larger = [state.cost(p.site, p.blueprint, p.size + 1).parameters for p in candidate.placements]
            quarter = [
                c
                for c in grown(found)
                if [p.site for p in c.placements] == [p.site for p in candidate.placements]
            ]
            assert sum(larger) > left // 4
            assert max(c.parameters for c in quarter) > left // 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_state_gives_the_same_candidates_with_and_without_a_plan(family: str) -> None:
    state, plan = state_of(body_of(family)), HostPlan()
    first = candidates(state, plan=plan)
    assert candidates(state, plan=plan) == candidates(state) == first
    fewer = dataclasses.replace(state, parameters_left=state.parameters_left // 3)
    assert candidates(fewer, plan=plan) == candidates(fewer) != first


def test_an_mlp_is_offered_all_layers_at_once_ways_around_and_single_layers() -> None:
    found = candidates(state_of(body_of("mlp")))
    group, *_ = grown(found)
    assert [p.site for p in group.placements] == [
        "bypass:layers.0->layers.1", "bypass:layers.1->layers.2", "bypass:layers.2->head",
    ]  # fmt: skip
    assert len({p.size for p in group.placements}) == 1
    around = [c.placements[0] for c in grown(found) if c.placements[0].long and len(c.placements) == 1]
    assert {p.blueprint for p in around if p.site == "bypass:layers.0->head"} == {"widen", "shortcut"}
    beside = {(p.kind, p.blueprint) for c in grown(found) for p in c.placements}
    assert {("parallel", "bottleneck"), ("parallel", "lowrank")} <= beside
    ranks = {p.site: p.size for c in grown(found) for p in c.placements if p.blueprint == "lowrank"}
    assert ranks["parallel:layers.1"] == 4  # no rank beyond the layer's own


def test_a_transformer_is_offered_all_its_mlps_alike_and_a_copy_of_each_block() -> None:
    found = candidates(state_of(body_of("gpt")))
    assert [p.source for p in grown(found)[0].placements] == ["blocks.0.mlp.fc", "blocks.1.mlp.fc"]
    assert [c.placements[0].site for c in grown(found) if c.placements[0].kind == "stack"] == [
        "stack:blocks.0", "stack:blocks.1",
    ]  # fmt: skip


def test_long_bypasses_are_left_out_on_request() -> None:
    for family in FAMILIES:
        state = state_of(body_of(family))
        assert any(p.blueprint == "shortcut" for c in candidates(state) for p in c.placements)
        without = candidates(state, CandidateConfig(shortcut=False))
        assert not any(p.blueprint == "shortcut" for c in without for p in c.placements)
        assert grown(without)


def test_what_may_not_be_chosen_says_why_and_leaves_its_size_open() -> None:
    body = body_of("mlp")
    taken = [SiteView(s, "occupied" if s.name == "bypass:layers.0->layers.1" else "") for s in body.sites]
    found = candidates(state_of(body, sites=taken))
    masked = {c.placements[0].site: c for c in found if c.unavailable}
    single = masked["bypass:layers.0->layers.1"]
    assert single.placements[-1].size == 0
    group = next(c for c in found if len(c.placements) > 1)
    assert group.unavailable == "1 of 3 places are not free: bypass:layers.0->layers.1 is occupied"
    for changes, why in (
        ({"window_open": False}, "window"),
        ({"parameters_left": 0}, "parameter budget"),
        ({"flops_left": 0.0}, "FLOPs budget"),
        ({"germinations_left": 0}, "0 germinations"),
        ({"seeds_left": 0}, "0 seeds"),
        ({"parameters_left": 3}, "3 parameters"),
    ):
        found = candidates(state_of(body, **changes))  # type: ignore[arg-type]
        assert not grown(found)
        assert all(why in c.unavailable for c in found if c.action == "grow")
    two = candidates(state_of(body, germinations_left=2))
    assert next(c for c in two if len(c.placements) > 1).unavailable.startswith("3 seeds at once are more")
    assert len(grown(two)) > 5


def test_flops_limit_sizes_too() -> None:
    body = body_of("mlp")
    free, tight = state_of(body), state_of(body, flops_left=2e7)
    assert max(c.flops for c in grown(candidates(tight))) < max(c.flops for c in grown(candidates(free)))


def test_dormant_layers_may_be_recycled_the_sleepiest_first_and_not_twice_on_one_measurement() -> None:
    body = body_of("mlp")
    health = {f"layers.{i}": signal(f"layers.{i}", 5, dormancy=0.2 * i) for i in range(3)}
    health["head"] = signal("head", 5, dormancy=0.9)
    state = state_of(body, health=health)
    found = [c for c in candidates(state) if c.action == "recycle"]
    assert [c.placements[0].target for c in found] == ["layers.1", "layers.2"]
    one = candidates(state, CandidateConfig(max_recycled=1))
    assert [c.placements[0].target for c in one if c.action == "recycle"] == ["layers.2"]
    again = {
        c.placements[0].target: c
        for c in candidates(state, recycled={"layers.2": 7})
        if c.action == "recycle"
    }
    assert "not measured since" in again["layers.2"].unavailable
    assert not again["layers.1"].unavailable
    cnn = state_of(body_of("cnn"), health={"layers.1": signal("layers.1", dormancy=0.5)})
    (masked,) = (c for c in candidates(cnn) if c.action == "recycle")
    assert "dense layers" in masked.unavailable


def test_seeds_on_their_way_may_be_culled_and_held_once_they_hold() -> None:
    body = body_of("mlp")
    seeds = [
        SeedView("s0", "bypass:layers.0->layers.1", "widen", 4, "fossilized", 0.1),
        SeedView("s1", "bypass:layers.1->layers.2", "widen", 4, "training", None),
        SeedView("s2", "bypass:layers.2->head", "widen", 4, "holding", 0.1),
    ]
    found = candidates(state_of(body, seeds=seeds))
    assert [(c.action, c.seed_id) for c in found if c.seed_id] == [
        ("cull", "s1"),
        ("cull", "s2"),
        ("hold", "s2"),
    ]
    cull = next(c for c in found if c.seed_id == "s1")
    assert cull.parameters == -body.cost("bypass:layers.1->layers.2", "widen", 4).parameters


def test_scores_come_from_the_run_and_are_asked_for_only_where_something_can_grow() -> None:
    loop = ProbedLoop(
        total_steps=2000, held_out=False, budget={"max_parameters_ratio": 4.0, "max_scoring_fraction": 1.0}
    )
    loop.run(4)
    found = candidates(loop.state)
    scored = [p for c in grown(found) for p in c.placements if p.score is not None]
    assert {p.site for p in scored} >= {"bypass:0->2", "bypass:2->4", "bypass:0->4"}
    assert all(p.score_z is not None and p.score_excess is not None for p in scored)
    spent = loop.controller.ledger.scoring_flops
    assert spent > 0
    candidates(loop.state, CandidateConfig(scored=False))
    candidates(dataclasses.replace(loop.state, window_open=False))
    assert loop.controller.ledger.scoring_flops == spent
    assert not any(
        p.score for c in candidates(state_of(loop.body)) for p in c.placements
    )  # too dear: not scored


def test_a_transformer_is_not_scored() -> None:
    asked: list[object] = []

    def score(names: object, size: int) -> dict[str, SiteScore]:
        asked.append(names)
        return {}

    candidates(state_of(body_of("gpt"), score=score))
    assert not asked
    candidates(state_of(body_of("mlp"), score=score))
    assert len(asked) == 1


def test_a_deep_host_is_offered_a_bounded_choice_quickly() -> None:
    body = chain_of(300)
    state, plan = state_of(body), HostPlan()
    found = candidates(state, plan=plan)
    assert 20 < len(found) <= 64
    assert any(p.site == "bypass:0->598" and p.blueprint == "shortcut" for c in found for p in c.placements)
    assert max(len(c.placements) for c in found) == 299  # the group, which 8 germinations do not reach
    started = time.perf_counter()
    candidates(state, plan=plan)
    assert time.perf_counter() - started < 0.25  # some 4 ms; this machine may be busy
    few = candidates(state, CandidateConfig(max_candidates=10))
    assert len(few) == 10


def test_many_seeds_do_not_crowd_out_growth() -> None:
    body = chain_of(40)
    seeds = [SeedView(f"s{i}", s.name, "lowrank", 1, "holding", 0.0) for i, s in enumerate(body.sites[:40])]
    found = candidates(state_of(body, seeds=seeds))
    assert len(found) == 64
    assert len(grown(found)) >= 16


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="every share should lie in"):
        CandidateConfig(shares=(0.0,))
    with pytest.raises(ConfigError, match="blueprints should not be empty"):
        CandidateConfig(blueprints=())
    with pytest.raises(ConfigError, match="at least 2"):
        CandidateConfig(max_candidates=1)


def test_a_plan_follows_growth_and_other_options() -> None:
    loop, plan = ProbedLoop(total_steps=1000).run(3), HostPlan()
    assert candidates(loop.state, plan=plan) == candidates(loop.state)
    narrowest = CandidateConfig(blueprints=("shortcut", "widen"), max_sites=1)

    def widened() -> set[str]:
        found = candidates(loop.state, narrowest, plan=plan)
        assert [(p.site, p.blueprint) for p in found[1].placements] == [
            ("bypass:0->2", "widen"), ("bypass:2->4", "widen"),
        ]  # fmt: skip
        single = [c.placements[0] for c in found if c.action == "grow" and len(c.placements) == 1]
        return {p.site for p in single if p.blueprint == "widen"} - {"bypass:0->4"}

    assert widened() == {"bypass:0->2"}
    loop.body.germinate("bypass:0->2", "widen", 20)
    assert widened() == {"bypass:2->4"}


def test_costs_are_those_of_the_seeds_that_are_planted() -> None:
    for family in FAMILIES:
        body = body_of(family)
        before = body.num_parameters
        for candidate in grown(candidates(state_of(body)))[::3]:
            seeds = [body.germinate(p.site, p.blueprint, p.size) for p in candidate.placements]
            assert body.num_parameters == before + candidate.parameters
            for seed in seeds:
                body.cull(seed)
        assert body.num_parameters == before
