"""Policies on states built by hand: the costs are real parameter counts, the scores come from tables."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch

from esper.errors import ConfigError, GrowthError
from esper.hosts.mlp import MLP, MLPConfig
from esper.kasmina.blueprints.registry import Cost
from esper.kasmina.body import attach
from esper.kasmina.expressivity import SiteScore
from esper.kasmina.scoring import score_sites
from esper.kasmina.sites import Site, site_name
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import Decision, HealthSignal
from esper.tamiyo.policies import make_policy, policy_names
from esper.tamiyo.policies.events import EventConfig, EventSchedule
from esper.tamiyo.policies.shape import hidden_layers, layers_in_series, long_bypasses
from esper.tamiyo.policies.sizes import Room, largest_size
from esper.tamiyo.state import GrowthState, SeedView, SiteView

BAD = (64, 16, 4, 16, 6, 10)
UNIFORM = (64, 16, 16, 16, 16, 10)
ELSEWHERE = ("remote", "tamiyo")  # a service's answers, and a network's: policies/test_NAME.py
RULES = [name for name in policy_names() if name not in ELSEWHERE]
GROWING = [name for name in RULES if name != "off"]


# --- hosts -----------------------------------------------------------------------------------------------


def mlp(widths: Sequence[int]) -> tuple[ModelTopology, list[Site]]:
    """Layers ``fc0``, ``fc1``, ... and the sites that an MLP of these widths has."""
    last = len(widths) - 2
    layers, edges, sites = [], [], []
    for i in range(last + 1):
        p, q = widths[i], widths[i + 1]
        layers.append(
            LayerInfo(
                f"fc{i}", "Linear", (p,), (q,), (p + 1) * q, 2 * p * q, 1,
                is_output=i == last, reads_input=i == 0,
            )
        )  # fmt: skip
        sites.append(site("parallel", f"fc{i}", f"fc{i}", p, q, ("bottleneck", "lowrank")))
    for i in range(last):
        edges.append(Edge(f"fc{i}", f"fc{i + 1}", ("relu",)))
        fits = ("shortcut", "widen") if i + 1 == last else ("widen",)
        sites.append(
            site(
                "bypass", f"fc{i}", f"fc{i + 1}", widths[i], widths[i + 2], fits, long=i + 1 == last and i < 2
            )
        )
    for i in range(min(2, last - 1)):
        sites.append(site("bypass", f"fc{i}", f"fc{last}", widths[i], widths[-1], ("shortcut",), long=True))
    total = sum(layer.num_parameters for layer in layers)
    return ModelTopology(tuple(layers), tuple(edges), {}, total), sites


def gpt(depth: int, d: int = 16, hidden: int = 32, tokens: int = 8) -> tuple[ModelTopology, list[Site]]:
    """Blocks of one MLP each on a residual stream, embeddings before and a head behind."""
    layers = [LayerInfo("tokens", "Embedding", (tokens,), (tokens, d), 65 * d, 0, 1)]
    edges, sites, stream = [], [], ["tokens"]
    for i in range(depth):
        fc, proj = f"blocks.{i}.fc", f"blocks.{i}.proj"
        layers.append(
            LayerInfo(fc, "Linear", (tokens, d), (tokens, hidden), (d + 1) * hidden, 2 * d * hidden, 1)
        )
        layers.append(
            LayerInfo(proj, "Linear", (tokens, hidden), (tokens, d), (hidden + 1) * d, 2 * d * hidden, 1)
        )
        edges += [Edge(name, fc) for name in stream] + [Edge(fc, proj, ("gelu",))]
        stream.append(proj)
        sites.append(
            Site(
                site_name("bypass", fc, proj), "bypass", fc, proj, (tokens, d), (tokens, d), ("gelu",),
                blueprints=("widen",),
            )
        )  # fmt: skip
        sites.append(site("stack", f"blocks.{i}", f"blocks.{i}", d, d, ("stack",)))
    layers.append(
        LayerInfo("head", "Linear", (tokens, d), (tokens, 65), 65 * d, 2 * d * 65, 1, is_output=True)
    )
    edges += [Edge(name, "head") for name in stream]
    total = sum(layer.num_parameters for layer in layers)
    return ModelTopology(tuple(layers), tuple(edges), {}, total, positions=tokens, transformer=True), sites


def site(
    kind: Any, source: str, target: str, p: int, q: int, blueprints: tuple[str, ...], *, long: bool = False
) -> Site:
    ops = ("relu",) if kind == "bypass" and "widen" in blueprints else ("long",) if long else ()
    name = site_name(kind, source, target)
    return Site(name, kind, source, target, (p,), (q,), ops, long=long, blueprints=blueprints)


def parameters(place: Site, blueprint: str, size: int) -> int:
    """Parameters of the real blueprints, for vectors."""
    p, q = place.source_shape[-1], place.target_shape[-1]
    if blueprint == "stack":
        if size != 1:
            raise GrowthError("a stack is one block")
        return 2 * p * 32 + 32 + p
    if blueprint == "shortcut":
        return p * q if size >= min(p, q) else size * (p + q)
    return size * (p + q) if blueprint == "lowrank" else size * (p + 1) + size * q


# --- states ----------------------------------------------------------------------------------------------


def score(excess: float, z: float) -> SiteScore:
    floor = 0.2
    return SiteScore(floor + excess, floor, floor + 0.02, z, 0.06, excess, 1e6)


def no_scores(names: Sequence[str], size: int) -> dict[str, SiteScore]:
    raise GrowthError("scoring would cost more than max_scoring_fraction=0.03 leaves")


def from_table(table: Mapping[str, SiteScore]) -> Callable[[Sequence[str], int], dict[str, SiteScore]]:
    return lambda names, size: {name: table[name] for name in names if name in table}


def make_state(
    host: tuple[ModelTopology, list[Site]],
    *,
    fraction: float = 0.1,
    unavailable: Mapping[str, str] | None = None,
    scores: Callable[[Sequence[str], int], dict[str, SiteScore]] = no_scores,
    budget: float = 2.0,
    seed: int = 0,
    **changes: Any,
) -> GrowthState:
    topology, sites = host
    by_name = {place.name: place for place in sites}

    def cost(name: str, blueprint: str, size: int) -> Cost:
        count = parameters(by_name[name], blueprint, size)
        return Cost(count, 2 * count * topology.positions)

    state = GrowthState(
        step=round(1000 * fraction),
        total_steps=1000,
        epoch=0,
        window_open=True,
        topology=topology,
        sites=[SiteView(place, (unavailable or {}).get(place.name, "")) for place in sites],
        seeds=[],
        health={},
        host_parameters=topology.num_parameters,
        num_parameters=topology.num_parameters,
        parameters_left=int((budget - 1) * topology.num_parameters),
        flops_left=math.inf,
        germinations_left=8,
        train_loss=1.0,
        measure_held_out_loss=lambda: None,
        tokens_per_parameter=50.0,
        transformer=topology.transformer,
        cost=cost,
        score=scores,
        generator=torch.Generator().manual_seed(seed),
    )
    return dataclasses.replace(state, **changes)


def seed_at(name: str, blueprint: str = "widen", size: int = 16) -> SeedView:
    return SeedView("s1", name, blueprint, size, "fossilized", None)


def health(layer: str, dormancy: float, step: int = 90) -> HealthSignal:
    return HealthSignal(
        layer,
        "",
        0,
        0,
        step,
        1.0,
        0.0,
        dormancy,
        0.0,
        4.0,
        1.0,
        1.0,
        1e-3,
        0.0,
        False,
        0.9,
        0.1,
        0,
        0,
        0,
        0.0,
    )


def only(decisions: Sequence[Decision]) -> Decision:
    assert len(decisions) == 1
    return decisions[0]


# --- helpers ---------------------------------------------------------------------------------------------


def test_shape_sees_the_neck_and_the_ways_around_it() -> None:
    state = make_state(mlp(BAD))
    layers = hidden_layers(state)
    assert [layer.name for layer in layers] == ["fc0", "fc1", "fc2", "fc3"]
    assert [layer.width for layer in layers] == [16, 4, 16, 6]
    # fc1 has 64 before and at most 16 behind it, fc3 has 10 outputs to serve
    assert [layer.neck for layer in layers] == [1.0, 0.25, 1.6, 0.6]
    assert [(layer.fan_in, layer.fan_out) for layer in layers] == [(65, 4), (17, 16), (5, 6), (17, 10)]
    assert layers_in_series(state.topology) == 5
    bypasses = long_bypasses(state, ["shortcut"])
    assert [(b.view.site.name, b.from_input) for b in bypasses] == [
        ("bypass:fc0->fc4", True),
        ("bypass:fc1->fc4", False),
    ]


def test_shape_counts_what_was_grown() -> None:
    state = make_state(mlp(BAD), seeds=[seed_at("bypass:fc1->fc2", size=20)])
    layers = {layer.name: layer for layer in hidden_layers(state)}
    assert layers["fc1"].width == 24
    assert layers["fc0"].fan_out == 24  # fc0 feeds 4 units of the host and 20 new ones
    assert layers["fc2"].fan_in == 25  # a unit of fc2 reads all of them and a bias
    assert layers["fc1"].neck == 1.5


def test_a_residual_stream_is_well_connected() -> None:
    assert layers_in_series(gpt(depth=6)[0]) == 2


@pytest.mark.parametrize("room", [0, 80, 81, 500, 1000, 123_456])
def test_largest_size_fits_and_the_next_does_not(room: int) -> None:
    state = make_state(mlp(BAD))
    place = ("bypass:fc0->fc1", "widen")  # 65 + 4 parameters a unit
    fit = largest_size(state, [place], Room(room, math.inf, 1.0))
    assert (0 if fit is None else fit.size) == room // 69
    if fit is not None:
        assert fit.cost.parameters == 69 * fit.size


def test_size_ends_where_a_blueprint_ends() -> None:
    state = make_state(mlp(BAD))
    plenty = Room(10**9, math.inf, 1.0)
    shortcut = largest_size(state, [("bypass:fc0->fc4", "shortcut")], plenty, least=16)
    assert shortcut is not None
    assert (shortcut.size, shortcut.cost.parameters) == (10, 640)  # full rank; more would be the same
    stack = largest_size(make_state(gpt(2)), [("stack:blocks.0", "stack")], plenty, least=16)
    assert stack is not None
    assert stack.size == 1


def test_size_draws_on_the_reserve_for_the_least_only() -> None:
    state = make_state(mlp(BAD))
    places = [("bypass:fc0->fc1", "widen"), ("bypass:fc1->fc2", "widen")]  # 69 + 33 parameters a unit
    share = Room(1000, math.inf, 1.0)
    assert largest_size(state, places, share, least=16) is None
    fit = largest_size(state, places, share, least=16, reserve=Room(5000, math.inf, 1.0))
    assert fit is not None
    assert (fit.size, fit.cost.parameters) == (16, 16 * 102)


def test_flops_limit_a_size_as_parameters_do() -> None:
    state = make_state(mlp(BAD), fraction=0.5)
    samples = Room.left(state).samples
    assert samples == pytest.approx(0.5 * 50.0 * state.host_parameters)
    room = Room(10**9, 3 * 2 * 69 * 7.5 * samples, samples)  # 3 x 2 x 69 FLOPs a unit and sample
    fit = largest_size(state, [("bypass:fc0->fc1", "widen")], room)
    assert fit is not None
    assert fit.size == 7


@pytest.mark.parametrize("interval", [1, 20, 37, 130])
def test_every_event_comes_once_whatever_the_decision_interval(interval: int) -> None:
    events = EventSchedule(EventConfig(num_events=3, start=0.1, end=0.4))
    used = []
    for step in range(0, 1001, interval):
        if events.due(step, 1000):
            events.use()
            used.append(step)
    assert len(used) == 3
    for moment, step in zip((100, 200, 300), used, strict=True):
        assert moment <= step <= moment + 2 * interval
    assert not events.due(1000, 1000)


# --- all growing policies --------------------------------------------------------------------------------

CLEAR = score(1.5, 60.0)
EVERYTHING_CLEAR = from_table({place.name: CLEAR for place in mlp(BAD)[1]})


@pytest.mark.parametrize("name", GROWING)
def test_events_share_the_budget_and_never_exceed_it(name: str) -> None:
    policy = make_policy(name, num_events=3, start=0.0, end=0.3)
    host = mlp((64, 40, 4, 40, 12, 10))
    left, seeds, germinated = 5000, [], 0
    for step in range(0, 400, 20):
        state = make_state(
            host, fraction=step / 1000, parameters_left=left, seeds=seeds, scores=EVERYTHING_CLEAR,
            unavailable={seed.site: "occupied" for seed in seeds}, seed=step,
        )  # fmt: skip
        decisions = policy.decide(state)
        assert decisions
        for decision in decisions:
            json.loads(msgspec.json.encode(decision))
            assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision
            assert decision.policy == name
            assert decision.reason
            assert decision.numbers
            if decision.action == "germinate":
                price = state.cost(decision.site, decision.blueprint, decision.size).parameters
                assert decision.numbers["parameters"] == price
                left -= price
                germinated += 1
                seeds = [*seeds, seed_at(decision.site, decision.blueprint, decision.size)]
    assert left >= 0
    # two ways around, one neck, four layers beside the output
    assert germinated == {"shortcut": 2, "cond": 1, "uniform": 4}.get(name, 3)


@pytest.mark.parametrize("name", GROWING)
def test_nothing_grows_at_unavailable_sites_or_outside_limits(name: str) -> None:
    host = mlp(BAD)
    everywhere = {place.name: "under embargo until step 500" for place in host[1]}
    for changes in (
        {"unavailable": everywhere},
        {"parameters_left": 0},
        {"parameters_left": 5},
        {"germinations_left": 0},
        {"flops_left": 0.0},
        {"flops_left": 1.0},
        {"window_open": False},
        {"fraction": 0.01},
    ):
        policy = make_policy(name, start=0.05)
        decision = only(policy.decide(make_state(host, scores=EVERYTHING_CLEAR, **changes)))
        assert decision.action == "wait", changes
        assert decision.reason
        assert "fraction" in decision.numbers


@pytest.mark.parametrize("name", GROWING)
def test_one_free_site_is_all_that_is_used(name: str) -> None:
    host = mlp(BAD)
    for free in host[1]:
        closed = {place.name: "occupied" for place in host[1] if place.name != free.name}
        state = make_state(host, unavailable=closed, scores=EVERYTHING_CLEAR)
        for decision in make_policy(name).decide(state):
            assert decision.action == "wait" or decision.site == free.name


@pytest.mark.parametrize("name", RULES)
def test_state_round_trip_gives_the_same_decisions(name: str) -> None:
    def states() -> list[GrowthState]:
        signals = {layer: health(layer, 0.4) for layer in ("fc0", "fc2")}
        return [
            make_state(mlp(BAD), fraction=f, seed=int(1000 * f), scores=EVERYTHING_CLEAR, health=signals)
            for f in (0.06, 0.1, 0.18, 0.2, 0.29)
        ]

    first = make_policy(name)
    for state in states()[:2]:
        first.decide(state)
    saved = msgspec.json.decode(msgspec.json.encode(first.state_dict()))  # plain values only
    second = make_policy(name)
    second.load_state_dict(saved)
    assert [first.decide(s) for s in states()[2:]] == [second.decide(s) for s in states()[2:]]
    assert second.state_dict() == first.state_dict()


# --- expressivity ----------------------------------------------------------------------------------------


def test_a_bottleneck_is_led_around_when_the_long_bypass_clears_its_floor() -> None:
    asked: list[Sequence[str]] = []

    def scores(names: Sequence[str], size: int) -> dict[str, SiteScore]:
        asked.append(list(names))
        return {name: score(4.2, 148.0) for name in names}

    decision = only(make_policy("expressivity").decide(make_state(mlp(BAD), scores=scores)))
    assert (decision.action, decision.site, decision.blueprint) == (
        "germinate",
        "bypass:fc0->fc4",
        "shortcut",
    )
    assert decision.size == 10
    assert asked == [["bypass:fc0->fc4"]]  # nothing else had to be paid for
    for key, value in {"excess": 4.2, "floor": 0.2, "z": 148.0, "share": 0.42}.items():
        assert decision.numbers[f"{key}:bypass:fc0->fc4"] == pytest.approx(value)
    assert decision.numbers["neck:fc1"] == 0.25
    assert decision.confidence == pytest.approx(0.94)


def test_the_largest_excess_is_widened_when_nothing_is_missing_around() -> None:
    table = from_table(
        {
            "bypass:fc0->fc4": score(0.01, 9.0),
            "bypass:fc0->fc1": score(0.4, 14.0),
            "bypass:fc1->fc2": score(0.9, 61.0),
            "bypass:fc2->fc3": score(3.0, 1.0),  # large, but no larger than chance makes it
            "bypass:fc3->fc4": score(0.8, 98.0),
        }
    )
    policy = make_policy("expressivity")
    state = make_state(mlp(BAD), scores=table)
    decision = only(policy.decide(state))
    assert (decision.site, decision.blueprint) == ("bypass:fc1->fc2", "widen")
    assert decision.size >= 16
    # half of the budget, as one more event is to come
    assert decision.numbers["parameters"] <= state.parameters_left / 2
    assert decision.numbers["parameters"] + 33 > state.parameters_left // 2


@pytest.mark.parametrize("weak", [score(-0.05, -2.0), score(0.02, 1.0), score(0.3, 2.9), score(0.09, 6.0)])
def test_a_uniform_host_without_excess_waits_and_is_not_scored_again(weak: SiteScore) -> None:
    calls: list[int] = []

    def scores(names: Sequence[str], size: int) -> dict[str, SiteScore]:
        calls.append(len(names))
        return dict.fromkeys(names, weak)

    policy = make_policy("expressivity", num_events=1)
    host = mlp(UNIFORM)
    decision = only(policy.decide(make_state(host, scores=scores)))
    assert decision.action == "wait"
    assert "no site clears its noise floor" in decision.reason
    assert decision.numbers["excess:bypass:fc0->fc1"] == weak.excess
    assert calls == [1, 5]  # around first, then four hidden layers and the early bypass
    assert only(policy.decide(make_state(host, scores=scores, fraction=0.2))).action == "wait"
    assert calls == [1, 5]


@pytest.mark.parametrize(("widths", "expected"), [(BAD, "bypass:fc0->fc4"), (UNIFORM, "")])
def test_the_shape_decides_where_scoring_is_too_costly(widths: tuple[int, ...], expected: str) -> None:
    decision = only(make_policy("expressivity").decide(make_state(mlp(widths))))
    assert decision.site == expected
    assert decision.action == ("germinate" if expected else "wait")
    assert ("fc1 is a neck" if expected else "max_scoring_fraction") in decision.reason
    closed = {"bypass:fc0->fc4": "occupied", "bypass:fc1->fc4": "occupied"}
    decision = only(make_policy("expressivity").decide(make_state(mlp(widths), unavailable=closed)))
    assert decision.site == ("bypass:fc1->fc2" if expected else "")
    strict = make_policy("expressivity", bad_shape=0.2)
    assert only(strict.decide(make_state(mlp(widths)))).action == "wait"


def test_a_host_with_one_hidden_layer_is_widened_and_not_led_around() -> None:
    scores = from_table({"bypass:fc0->fc1": score(2.0, 50.0)})
    decision = only(
        make_policy("expressivity").decide(make_state(mlp((64, 4, 10)), scores=scores, budget=12.0))
    )
    assert (decision.site, decision.blueprint) == ("bypass:fc0->fc1", "widen")


@pytest.mark.parametrize(("tpp", "grows"), [(30.0, False), (110.0, False), (111.0, True), (600.0, True)])
def test_a_transformer_goes_by_tokens_per_parameter(tpp: float, grows: bool) -> None:
    state = make_state(gpt(depth=3), tokens_per_parameter=tpp, scores=EVERYTHING_CLEAR)
    decisions = make_policy("expressivity").decide(state)
    assert all(d.numbers["tokens_per_parameter"] == tpp for d in decisions)
    if not grows:
        assert only(decisions).action == "wait"
        assert f"{tpp:.0f} tokens a parameter" in decisions[0].reason
        return
    assert [d.site for d in decisions] == [f"bypass:blocks.{i}.fc->blocks.{i}.proj" for i in range(3)]
    assert len({d.size for d in decisions}) == 1
    spent = sum(d.numbers["parameters"] for d in decisions)
    assert spent <= state.parameters_left < spent + 3 * 33  # one more unit each would not fit


def test_a_deep_transformer_is_widened_over_two_events_to_one_width() -> None:
    policy, host = make_policy("expressivity"), gpt(depth=6)
    first = policy.decide(make_state(host, tokens_per_parameter=200.0, germinations_left=4))
    assert len(first) == 4
    seeds = [seed_at(d.site, d.blueprint, d.size) for d in first]
    spent = int(sum(d.numbers["parameters"] for d in first))
    later = make_state(host, fraction=0.2, tokens_per_parameter=200.0, seeds=seeds)
    later = dataclasses.replace(later, parameters_left=later.parameters_left - spent)
    second = policy.decide(later)
    assert {d.size for d in second} == {first[0].size}
    assert len({d.site for d in [*first, *second]}) == 6


@pytest.mark.parametrize(("dormancy", "fires"), [(0.29, False), (0.30, False), (0.31, True)])
def test_recycling_starts_above_its_threshold(dormancy: float, fires: bool) -> None:
    state = make_state(mlp(UNIFORM), health={"fc1": health("fc1", dormancy)}, window_open=False)
    decision = only(make_policy("expressivity").decide(state))
    assert decision.action == ("recycle" if fires else "wait")
    if fires:
        assert decision.site == "fc1"
        assert decision.numbers["dormancy"] == dormancy
        assert "31% of the units of fc1 are dormant" in decision.reason


def test_recycling_waits_for_its_cooldown_and_for_a_fresh_measurement() -> None:
    policy = make_policy("expressivity", num_events=0, recycle_cooldown_steps=100)

    def actions(fraction: float, measured: int, dormancy: float = 0.5) -> list[str]:
        signals = {"fc1": health("fc1", dormancy, measured)}
        return [d.action for d in policy.decide(make_state(mlp(UNIFORM), fraction=fraction, health=signals))]

    assert actions(0.1, 90) == ["recycle"]
    assert actions(0.15, 140, dormancy=0.1) == ["wait"]  # the fresh units are awake
    assert actions(0.18, 170) == ["wait"]  # too early
    assert actions(0.25, 95) == ["wait"]  # nothing was measured since
    assert actions(0.25, 240) == ["recycle"]


def test_recycling_in_vain_doubles_the_cooldown() -> None:
    policy = make_policy("expressivity", num_events=0, recycle_cooldown_steps=100)

    def actions(fraction: float, measured: int, dormancy: float = 0.5) -> list[str]:
        signals = {"fc1": health("fc1", dormancy, measured)}
        return [d.action for d in policy.decide(make_state(mlp(UNIFORM), fraction=fraction, health=signals))]

    assert actions(0.1, 90) == ["recycle"]
    assert actions(0.25, 240) == ["wait"]  # asleep again: 200 steps now
    resumed = make_policy("expressivity", num_events=0, recycle_cooldown_steps=100)
    resumed.load_state_dict(policy.state_dict())
    policy = resumed
    assert actions(0.31, 300) == ["recycle"]
    assert actions(0.55, 540) == ["wait"]  # in vain twice: 400 steps
    assert actions(0.72, 710) == ["recycle"]
    assert actions(0.75, 740, dormancy=0.1) == ["wait"]  # this time they stay awake: 100 steps again
    assert actions(0.83, 820) == ["recycle"]


def test_layers_that_cannot_be_recycled_are_not_asked_for() -> None:
    signals = {name: health(name, 0.9) for name in ("fc1", "fc4")}  # fc4 is the output
    readers = [seed_at("bypass:fc2->fc3")]  # reads the units of fc1, too
    state = make_state(mlp(UNIFORM), health=signals, seeds=readers, window_open=False)
    assert only(make_policy("expressivity").decide(state)).action == "wait"
    never = make_policy("expressivity", recycle_above=1.0)
    state = make_state(mlp(UNIFORM), health={"fc1": health("fc1", 1.0)}, window_open=False)
    assert only(never.decide(state)).action == "wait"


def test_recycling_and_growth_stand_side_by_side() -> None:
    state = make_state(mlp(BAD), health={"fc2": health("fc2", 0.5)}, scores=EVERYTHING_CLEAR)
    assert [d.action for d in make_policy("expressivity").decide(state)] == ["recycle", "germinate"]


def test_expressivity_on_a_real_body() -> None:
    """The rule, with the real topology, costs and scores of a host at its start."""
    torch.manual_seed(0)
    config = MLPConfig(hidden=(16, 4, 16, 6))
    host, x, y = MLP(config), torch.rand(512, 64), torch.randint(10, (512,))
    y = (x @ torch.randn(64, 10)).argmax(1)  # a teacher that the neck cannot let through
    optimizer = torch.optim.Adam(host.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(host(x), y).backward()
        optimizer.step()
    body = attach(host, x)

    def scores(names: Sequence[str], size: int) -> dict[str, SiteScore]:
        loss = lambda: torch.nn.functional.cross_entropy(host(x), y)  # noqa: E731
        sites = [body.site(name) for name in names]
        return score_sites(body, loss, sites, size=size, generator=torch.Generator().manual_seed(0))

    state = make_state((body.topology, body.sites), scores=scores, cost=body.cost)
    decision = only(make_policy("expressivity").decide(state))
    assert (decision.action, decision.site) == ("germinate", "bypass:layers.0->head")
    seed = body.germinate(decision.site, decision.blueprint, decision.size)
    assert seed.num_parameters == decision.numbers["parameters"] <= state.parameters_left
    layers = {layer.name: layer.neck for layer in hidden_layers(state)}
    assert layers == {"layers.0": 1.0, "layers.1": 0.25, "layers.2": 1.6, "layers.3": 0.6}
    assert layers_in_series(body.topology) == 5


# --- the other policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "site"), [((64, 16, 3, 16, 16, 10), "bypass:fc1->fc2"), (UNIFORM, ""), (BAD, "")]
)
def test_cond_follows_its_two_lines(widths: tuple[int, ...], site: str) -> None:
    # BAD is the border: 4 units, and a median of 11 makes 3.85 the limit
    decision = only(make_policy("cond").decide(make_state(mlp(widths))))
    assert decision.site == site
    assert decision.numbers["ratio"] == min(widths[1:-1]) / decision.numbers["median_width"]
    assert only(make_policy("cond", ratio=0.37).decide(make_state(mlp(BAD)))).site == "bypass:fc1->fc2"


def test_a_neck_is_at_least_doubled_where_the_budget_is_short() -> None:
    state = make_state(mlp(BAD), parameters_left=200)  # 33 parameters a unit of fc1
    decision = only(make_policy("narrowest", num_events=4).decide(state))
    assert (decision.site, decision.size) == ("bypass:fc1->fc2", 4)  # not the one unit that a quarter pays
    short = make_state(mlp(BAD), parameters_left=100)
    assert only(make_policy("narrowest").decide(short)).action == "wait"


def test_cond_waits_for_the_narrowest_rather_than_widen_another() -> None:
    state = make_state(mlp((64, 16, 3, 16, 16, 10)), unavailable={"bypass:fc1->fc2": "occupied"})
    assert "bypass:fc1->fc2 is occupied" in only(make_policy("cond").decide(state)).reason


def test_narrowest_dimensions_and_shortcut_each_follow_their_rule() -> None:
    state = make_state(mlp(BAD))
    expected = {
        "narrowest": ("bypass:fc1->fc2", "widen"),
        "dimensions": ("bypass:fc1->fc2", "widen"),  # 17 x 16 against 65 x 4 and 17 x 10
        "shortcut": ("bypass:fc0->fc4", "shortcut"),
    }
    for name, place in expected.items():
        decision = only(make_policy(name).decide(state))
        assert (decision.site, decision.blueprint) == place
    grown = [seed_at("bypass:fc1->fc2", size=20)]
    later = make_state(mlp(BAD), seeds=grown)
    assert only(make_policy("narrowest").decide(later)).site == "bypass:fc3->fc4"
    # feeding 24 units now, fc0 has the largest product: 65 x 24
    assert only(make_policy("dimensions").decide(later)).site == "bypass:fc0->fc1"


def test_shortcut_lays_each_way_around_once() -> None:
    policy = make_policy("shortcut", num_events=3)
    first = only(policy.decide(make_state(mlp(BAD))))
    seeds = [seed_at(first.site, "shortcut")]
    second = only(policy.decide(make_state(mlp(BAD), fraction=0.2, seeds=seeds)))
    assert second.site == "bypass:fc1->fc4"
    seeds.append(seed_at(second.site, "shortcut"))
    third = only(policy.decide(make_state(mlp(BAD), fraction=0.3, seeds=seeds)))
    assert third.reason == "the host has no long bypass that is not used"


def test_random_depends_on_the_generator_alone() -> None:
    def draw(seed: int, **options: Any) -> tuple[str, str, int]:
        decision = only(make_policy("random", **options).decide(make_state(mlp(BAD), seed=seed)))
        return decision.site, decision.blueprint, decision.size

    drawn = [draw(seed) for seed in range(60)]
    assert drawn == [draw(seed) for seed in range(60)]
    places = {(site, blueprint) for site, blueprint, _ in drawn}
    assert {blueprint for _, blueprint in places} == {"widen", "shortcut", "bottleneck", "lowrank"}
    assert len({site for site, _ in places}) == 11
    assert {draw(seed, blueprints=["widen"])[1] for seed in range(20)} == {"widen"}


def test_schedule_takes_sites_in_turn_or_all_alike() -> None:
    policy, sites = make_policy("schedule", num_events=4, start=0.0, end=0.4), []
    for fraction in (0.0, 0.1, 0.2, 0.3):
        sites.append(only(policy.decide(make_state(mlp(UNIFORM), fraction=fraction, budget=5.0))).site)
    assert sites == [f"bypass:fc{i}->fc{i + 1}" for i in range(4)]
    state = make_state(mlp(UNIFORM), budget=4.0)
    decisions = make_policy("schedule", order="uniform", num_events=1).decide(state)
    assert [d.site for d in decisions] == sites
    assert len({d.size for d in decisions}) == 1
    assert sum(d.numbers["parameters"] for d in decisions) <= state.parameters_left


def test_schedule_grows_depth() -> None:
    policy = make_policy("schedule", blueprints=["stack"], order="uniform", num_events=1, start=0.2, end=0.3)
    assert only(policy.decide(make_state(gpt(2), fraction=0.1, budget=9.0))).action == "wait"
    decisions = policy.decide(make_state(gpt(2), fraction=0.2, budget=9.0))
    assert [(d.site, d.blueprint, d.size) for d in decisions] == [
        ("stack:blocks.0", "stack", 1),
        ("stack:blocks.1", "stack", 1),
    ]


def test_schedule_follows_its_list() -> None:
    entries = [
        [0.2, "stack:blocks.0", "stack"],
        [0.1, "stack:blocks.1", "stack", 1],
        [0.2, "stack:blocks.0", "stack"],
    ]
    policy, host = make_policy("schedule", entries=entries), gpt(2)

    def sites(fraction: float, **changes: Any) -> list[str]:
        return [d.site for d in policy.decide(make_state(host, fraction=fraction, budget=9.0, **changes))]

    assert sites(0.05) == [""]
    assert sites(0.1) == ["stack:blocks.1"]
    assert sites(0.2, unavailable={"stack:blocks.0": "occupied"}) == [""]
    assert sites(0.22) == ["stack:blocks.0"]  # two of three: a site holds one seed on its way at a time
    assert sites(0.24, window_open=False) == [""]
    assert sites(0.26) == ["stack:blocks.0"]
    assert (
        only(policy.decide(make_state(host, fraction=0.3))).reason == "all 3 entries of the schedule are done"
    )


def test_schedule_shares_the_budget_among_entries_without_a_size() -> None:
    entries = [
        (0.1, "bypass:fc1->fc2", "widen"),
        (0.1, "bypass:fc3->fc4", "widen"),
        (0.5, "parallel:fc0", "lowrank"),
    ]
    state = make_state(mlp(BAD), budget=3.0)
    decisions = make_policy("schedule", entries=entries).decide(state)
    assert len(decisions) == 2
    for decision in decisions:
        third = state.parameters_left / 3
        assert third - 66 < decision.numbers["parameters"] <= third + 33


def test_off_says_so() -> None:
    decision = only(make_policy("off").decide(make_state(mlp(BAD))))
    assert (decision.action, decision.reason) == ("wait", "policy off")


# --- making policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "greedy",
            {},
            r"no policy named 'greedy'; policies are cond, dimensions, expressivity, narrowest, off",
        ),
        ("off", {"num_events": 1}, r"policy 'off' has no option 'num_events'; it has none"),
        ("cond", {"ration": 1}, r"policy 'cond' has no option 'ration'; it has num_events, .*ratio"),
        ("cond", {"ratio": 0.0}, r"ratio should lie in \(0, 1\]"),
        (
            "narrowest",
            {"num_events": -1, "min_size": 0},
            r"num_events should not be negative; min_size should be",
        ),
        ("dimensions", {"start": 0.5, "end": 0.2}, r"0 <= start <= end <= 1"),
        ("random", {"blueprints": "widen"}, r"blueprints should be a list of names"),
        ("shortcut", {"blueprint": ""}, r"blueprint should be the name"),
        ("schedule", {"order": "spiral"}, r"order should be 'round_robin' or 'uniform'"),
        ("schedule", {"blueprints": []}, r"blueprints should be a list of names, and not empty"),
        ("schedule", {"entries": [(0.1, "stack:a")]}, r"an entry should be \(fraction, site, blueprint\)"),
        ("schedule", {"entries": [(1.1, "stack:a", "stack")]}, r"fraction should lie in \[0, 1\]"),
        ("schedule", {"entries": [(0.1, "stack:a", "stack", -1)]}, r"size should not be negative"),
        ("expressivity", {"min_z": -1.0}, r"min_z should not be negative"),
        ("expressivity", {"min_share": 2.0}, r"min_share should lie in \[0, 1\]"),
        (
            "expressivity",
            {"min_tokens_per_parameter": -1.0},
            r"min_tokens_per_parameter should not be negative",
        ),
        ("expressivity", {"bad_shape": 1.5}, r"bad_shape should lie in \[0, 1\]"),
        ("expressivity", {"recycle_above": 1.5}, r"recycle_above should lie in \[0, 1\]"),
        ("expressivity", {"recycle_cooldown_steps": -1}, r"recycle_cooldown_steps should not be negative"),
    ],
)
def test_bad_names_and_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name, **options)


def test_schedule_names_sites_and_blueprints_that_the_host_lacks() -> None:
    state = make_state(gpt(2))
    with pytest.raises(ConfigError, match=r"no site 'stack:blocks.9' in this host; sites are bypass:"):
        make_policy("schedule", entries=[(0.1, "stack:blocks.9", "stack")]).decide(state)
    with pytest.raises(ConfigError, match=r"blueprint 'widen' does not fit 'stack:blocks.0'; stack do"):
        make_policy("schedule", entries=[(0.1, "stack:blocks.0", "widen")]).decide(state)


def test_listing_policies_imports_no_torch() -> None:
    code = "import sys, esper.tamiyo as t; t.policy_names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
