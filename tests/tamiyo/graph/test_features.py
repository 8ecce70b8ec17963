"""Every feature reacts to what it names, is finite whatever comes, and varies over real runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from graph_states import (
    SEED,
    TOPOLOGY,
    ProbedLoop,
    body_of,
    changed,
    hand_made,
    layer,
    place,
    signal,
    state_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import EAGER
from msgspec import structs

from esper.kasmina.topology import Edge
from esper.messages import Decision
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint
from esper.tamiyo.graph.features import (
    CANDIDATE_FEATURES,
    EDGE_FEATURES,
    GLOBAL_FEATURES,
    LIMIT,
    NODE_FEATURES,
    FeatureSpec,
    columns,
    log_ratio,
)
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.state import GrowthState, SeedView

Change = Callable[[DecisionPoint], DecisionPoint]
TABLES = {
    "x": NODE_FEATURES,
    "edge_attr": EDGE_FEATURES,
    "global_features": GLOBAL_FEATURES,
    "candidate_attr": CANDIDATE_FEATURES,
}
BUILDER = ModelGraphBuilder()


def column(point: DecisionPoint, table: str, name: str) -> list[float]:
    found = getattr(BUILDER.build(point).graph_data, table)
    at = [spec.name for spec in TABLES[table]].index(name)
    return [float(value) for value in found[:, at]]


def said(**changes: Any) -> Change:
    """Layer a's last signal says something else."""

    def change(point: DecisionPoint) -> DecisionPoint:
        return changed(point, signals=(*point.signals, signal("a", 9, **changes)))

    return change


def run(**changes: Any) -> Change:
    return lambda point: changed(point, **changes)


def layers(name: str, **changes: Any) -> Change:
    """Layer ``name`` is another one."""

    def change(point: DecisionPoint) -> DecisionPoint:
        found = tuple(structs.replace(x, **changes) if x.name == name else x for x in point.topology.layers)
        return changed(point, topology=structs.replace(point.topology, layers=found))

    return change


def edges(*found: Edge) -> Change:
    return lambda point: changed(point, topology=structs.replace(point.topology, edges=found))


def ops(name: str, *found: str) -> Change:
    """What lies on the edge that leaves ``name`` first is something else."""

    def change(point: DecisionPoint) -> DecisionPoint:
        at = next(i for i, edge in enumerate(point.topology.edges) if edge.source == name)
        all_edges = list(point.topology.edges)
        all_edges[at] = structs.replace(all_edges[at], ops=found)
        return changed(point, topology=structs.replace(point.topology, edges=tuple(all_edges)))

    return change


def placed(**changes: Any) -> Change:
    """Candidate 2 would be placed otherwise."""

    def change(point: DecisionPoint) -> DecisionPoint:
        found = list(point.candidates)
        found[2] = structs.replace(found[2], placements=(structs.replace(found[2].placements[0], **changes),))
        return changed(point, candidates=tuple(found))

    return change


def candidate(**changes: Any) -> Change:
    """Candidate 2 is another one."""

    def change(point: DecisionPoint) -> DecisionPoint:
        found = list(point.candidates)
        found[2] = structs.replace(found[2], **changes)
        return changed(point, candidates=tuple(found))

    return change


def seed(**changes: Any) -> Change:
    return run(seeds=(structs.replace(SEED, **changes),))


DIP = signal("a", 9, health_score=0.1)
EXTRA_SEED = structs.replace(
    SEED, seed_id="s1", site="parallel:b", source="b", target="b", stage="fossilized"
)
AROUND = structs.replace(
    SEED, seed_id="s2", site="bypass:in->out", source="in", target="out", blueprint="shortcut"
)

REACTS: dict[tuple[str, str], Change] = {
    ("x", "heard"): said(),
    ("x", "health"): said(health_score=0.1),
    ("x", "health_trend"): said(health_score=0.1),
    ("x", "dormancy"): said(dormancy=0.9),
    ("x", "dead_ratio"): said(dead_neuron_ratio=0.9),
    ("x", "rank_share"): said(effective_rank=5.0),
    ("x", "correlation"): said(avg_correlation=-0.5),
    ("x", "gradient_share"): said(gradient_norm=1e3),
    ("x", "gradient_snr"): said(gradient_snr=9.0),
    ("x", "update_ratio"): said(update_ratio=0.1),
    ("x", "width"): layers("a", output_shape=(64,)),
    ("x", "width_over_median"): layers("a", output_shape=(64,)),
    ("x", "neck"): layers("a", output_shape=(4,)),
    ("x", "depth"): edges(Edge("in", "b"), Edge("a", "b"), Edge("b", "out")),
    ("x", "is_output"): layers("b", is_output=True),
    ("x", "seeds"): run(seeds=()),
    ("edge_attr", "nonlinear"): ops("in"),
    ("edge_attr", "mixed"): ops("in", "relu", "reshape"),
    ("edge_attr", "residual"): ops("in", "relu", "AddBackward0"),
    ("edge_attr", "passed"): layers("n", type="LayerNorm"),
    ("edge_attr", "width_change"): layers("a", output_shape=(64,)),
    ("edge_attr", "span"): edges(*TOPOLOGY.edges[:3], Edge("in", "out"), TOPOLOGY.edges[4]),
    ("edge_attr", "inflow"): edges(*TOPOLOGY.edges[:3], Edge("in", "out"), TOPOLOGY.edges[4]),
    ("edge_attr", "grown"): run(seeds=()),
    ("global_features", "stability"): said(health_score=0.1),
    ("global_features", "health_trend"): said(health_score=0.1),
    ("global_features", "health"): said(health_score=0.1),
    ("global_features", "worst_health"): said(health_score=0.1),
    ("global_features", "dormancy"): said(dormancy=0.9),
    ("global_features", "worst_dormancy"): said(dormancy=0.9),
    ("global_features", "problems"): said(error_count=3),
    ("global_features", "sampled"): said(),
    ("global_features", "loss"): run(train_losses=(2.0, 1.6, 1.4, 1.1, 0.5)),
    ("global_features", "loss_drop"): run(train_losses=(4.0, 1.6, 1.4, 1.1, 1.0)),
    ("global_features", "loss_slope"): run(train_losses=(2.0, 1.6, 1.4, 1.1, 0.5)),
    ("global_features", "loss_noise"): run(train_losses=(2.0, 1.6, 2.4, 1.1, 1.0)),
    ("global_features", "held_out_known"): run(held_out_loss=None),
    ("global_features", "gap"): run(held_out_loss=3.0),
    ("global_features", "fraction"): run(step=60),
    ("global_features", "total_steps"): run(total_steps=1000),
    ("global_features", "tokens_per_parameter"): run(tokens_per_parameter=500.0),
    ("global_features", "tokens_left_per_parameter"): run(step=90),
    ("global_features", "host_parameters"): run(host_parameters=5000),
    ("global_features", "growth"): run(num_parameters=1900),
    ("global_features", "parameters_left"): run(parameters_left=10),
    ("global_features", "flops_limited"): run(flops_left=math.inf),
    ("global_features", "flops_left"): run(flops_left=1e7),
    ("global_features", "germinations_left"): run(germinations_left=0),
    ("global_features", "window_open"): run(window_open=False),
    ("global_features", "price"): run(price=0.3),
    ("global_features", "seeds_alive"): run(seeds=()),
    ("global_features", "seeds_settled"): run(seeds=(SEED, EXTRA_SEED)),
    ("global_features", "transformer"): run(transformer=True),
    ("global_features", "images"): layers("a", image=True, output_shape=(8, 2, 2)),
    ("global_features", "num_layers"): layers("n", type="Linear"),
    ("global_features", "layers_in_series"): edges(*(e for e in TOPOLOGY.edges if e.ops != ("AddBackward0",))),
    ("global_features", "bypassed"): run(seeds=(AROUND,)),
    ("global_features", "residual"): ops("in", "AddBackward0"),
    ("global_features", "narrowest"): layers("a", output_shape=(2,)),
    ("global_features", "neck"): layers("a", output_shape=(2,)),
    **{("candidate_attr", name): candidate(action=name) for name in ("cull", "recycle", "hold", "wait")},
    ("candidate_attr", "grow"): candidate(action="wait"),
    **{
        ("candidate_attr", name): placed(blueprint=name)
        for name in (
            "conv_widen", "shortcut", "stack", "bottleneck", "lowrank", "depthwise", "attention", "norm",
        )
    },
    ("candidate_attr", "widen"): placed(blueprint="lowrank"),
    ("candidate_attr", "other"): placed(blueprint="mine"),
    ("candidate_attr", "open"): placed(blueprint=""),
    ("candidate_attr", "parallel"): placed(kind="parallel"),
    ("candidate_attr", "bypass"): placed(kind="parallel"),
    ("candidate_attr", "long"): placed(long=True),
    ("candidate_attr", "placements"): candidate(placements=(place(), place("a", "b"), place("b", "out"))),
    ("candidate_attr", "covered"): candidate(placements=(place(), place("a", "b"), place("b", "out"))),
    ("candidate_attr", "size"): placed(size=100),
    ("candidate_attr", "widening"): placed(size=100),
    ("candidate_attr", "parameters"): candidate(parameters=500),
    ("candidate_attr", "cost"): run(price=0.3),
    ("candidate_attr", "flops"): candidate(flops=5000),
    ("candidate_attr", "budget_share"): run(parameters_left=10_000),
    ("candidate_attr", "source_width"): layers("a", output_shape=(64,)),
    ("candidate_attr", "source_over_median"): layers("a", output_shape=(2,)),
    ("candidate_attr", "neck"): layers("a", output_shape=(2,)),
    ("candidate_attr", "source_depth"): placed(source="in"),
    ("candidate_attr", "span"): placed(source="in", target="out"),
    ("candidate_attr", "to_output"): placed(target="out"),
    ("candidate_attr", "health"): said(health_score=0.1),
    ("candidate_attr", "dormancy"): said(dormancy=0.9),
    ("candidate_attr", "scored"): placed(score=0.0),
    ("candidate_attr", "score"): placed(score=2.0),
    ("candidate_attr", "score_excess"): placed(score=2.0, score_excess=1.0),
    ("candidate_attr", "score_z"): placed(score=2.0, score_z=4.0),
    ("candidate_attr", "occupied"): run(seeds=()),
    **{
        ("candidate_attr", stage): seed(stage=stage)
        for stage in ("germinated", "training", "blending")
    },
    ("candidate_attr", "holding"): seed(stage="blending"),
    ("candidate_attr", "measured"): seed(contribution=None),
    ("candidate_attr", "contribution"): seed(contribution=-0.3),
}  # fmt: skip
BEFORE: dict[tuple[str, str], Change] = {("edge_attr", "passed"): layers("n", type="Linear")}
"""What has to be so before the change for it to be one."""


@pytest.mark.parametrize(("table", "name"), [(t, s.name) for t, specs in TABLES.items() for s in specs])
def test_a_feature_reacts_to_what_it_names(table: str, name: str) -> None:
    point = BEFORE.get((table, name), lambda point: point)(hand_made())
    before, after = column(point, table, name), column(REACTS[table, name](point), table, name)
    assert before != after
    assert max(map(abs, before + after)) <= 4.0  # unit scale


def test_names_are_unique_and_explained() -> None:
    assert (len(NODE_FEATURES), len(EDGE_FEATURES)) == (16, 8)
    for specs in TABLES.values():
        assert len({spec.name for spec in specs}) == len(specs)
        assert all(len(spec.meaning) > 5 for spec in specs)
    with pytest.raises(AssertionError, match="differ"):
        columns((FeatureSpec("a", "is named"),), {"b": 0.0}, 1)


class Watching:
    """A policy that writes down every decision point, and follows a script."""

    name = "watching"

    def __init__(self, script: dict[int, Decision], config: CandidateConfig) -> None:
        self.script, self.config = script, config
        self.history = History()
        self.points: list[DecisionPoint] = []

    def decide(self, state: GrowthState) -> list[Decision]:
        price = 0.1 * (len(self.points) % 3)
        self.points.append(decision_point(state, self.history, price=price, config=self.config))
        wait = Decision(action="wait", reason="nothing is due", policy=self.name)
        return [self.script.get(state.step, wait)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def germinate(site: str, blueprint: str) -> Decision:
    return Decision(
        action="germinate", reason="to see one", policy="watching", site=site, blueprint=blueprint, size=4
    )


@cache
def real_points() -> tuple[DecisionPoint, ...]:
    """Points along a real run that grows, and of hosts of other kinds."""
    script = {5: germinate("bypass:0->4", "shortcut"), 13: germinate("bypass:2->4", "widen")}
    config = CandidateConfig(blueprints=("widen", "shortcut", "bottleneck", "lowrank", "norm"), max_beside=20)
    watching = Watching(script, config)
    ProbedLoop(
        watching, total_steps=60, lr=0.05,
        budget={
            "max_parameters_ratio": 6.0, "max_flops_ratio": 8.0, "site_cooldown_steps": 0,
            "max_scoring_fraction": 1.0,
        },
        lifecycle=EAGER | {"min_training_steps": 4, "min_holding_steps": 6, "mode": "isolated"},
    ).run(34)  # fmt: skip
    points = watching.points
    adapters = CandidateConfig(blueprints=("norm", "depthwise", "attention"))
    for family in ("mlp", "cnn", "gpt"):
        heard = {"layers.0": signal("layers.0", error_count=2, dormancy=0.9)}
        state = state_of(body_of(family), health=heard)
        site = state.sites[0].site
        seeds = [SeedView("s0", site.name, site.blueprints[-2], 1, "germinated", None)]
        points.append(decision_point(state, History()))
        closed = dataclasses.replace(state, seeds=seeds, window_open=False)
        points.append(decision_point(closed, History(), config=adapters))
    return tuple(points)


NOT_SEEN = {"other", "open"}
"""Blueprints that no built-in host is offered, and candidates made from signals alone."""


@pytest.mark.parametrize("table", TABLES)
def test_no_feature_is_constant_over_real_states(table: str) -> None:
    found = np.concatenate([getattr(BUILDER.build(p).graph_data, table).numpy() for p in real_points()])
    same = {spec.name for i, spec in enumerate(TABLES[table]) if np.ptp(found[:, i]) == 0}
    assert same - NOT_SEEN == set()
    assert np.abs(found).max() < LIMIT  # nothing is clipped in a plain run


ANY_LARGE = st.one_of(st.sampled_from([0.0, 1e-300, 1.0, 1e300, math.inf]), st.floats(0, 1e6))
ANY_SHARE = st.floats(0, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_all_features_are_finite_and_bounded_whatever_comes(data: st.DataObject) -> None:
    draw = data.draw
    big = st.integers(0, 10**15)
    signals = tuple(
        signal(
            draw(st.sampled_from(["in", "a", "n", "nowhere"])), draw(st.integers(0, 5)),
            gradient_norm=draw(ANY_LARGE), gradient_snr=draw(ANY_LARGE), update_ratio=draw(ANY_LARGE),
            effective_rank=draw(ANY_LARGE), execution_latency=draw(ANY_LARGE), health_score=draw(ANY_SHARE),
            dormancy=draw(ANY_SHARE), error_count=draw(big),
        )
        for _ in range(draw(st.integers(0, 12)))
    )  # fmt: skip
    losses = draw(st.lists(st.floats(allow_nan=False, min_value=-1e300), max_size=7))
    score = draw(st.one_of(st.none(), st.floats(allow_nan=False)))
    point = hand_made(
        signals=signals, step=draw(big), total_steps=draw(big), host_parameters=draw(big),
        num_parameters=draw(big), parameters_left=draw(big), flops_left=draw(ANY_LARGE),
        tokens_per_parameter=draw(ANY_LARGE), price=draw(ANY_LARGE), steps=tuple(range(len(losses))),
        train_losses=tuple(losses), held_out_loss=draw(st.one_of(st.none(), ANY_LARGE)),
        seeds=(structs.replace(SEED, size=draw(big), contribution=score),),
        candidates=(
            WAIT,
            Candidate(
                action="grow", parameters=draw(st.integers(-(10**15), 10**15)), flops=draw(big),
                placements=(place(size=draw(big), score=score, score_excess=score, score_z=score),),
            ),
            Candidate(action="cull", seed_id="s0", parameters=-draw(big), placements=(place(),)),
        ),
    )  # fmt: skip
    graph = BUILDER.build(point).graph_data
    for table in TABLES:
        found = getattr(graph, table)
        assert found.dtype == torch.float32
        assert bool(torch.isfinite(found).all())
        assert float(found.abs().max()) <= LIMIT


def test_what_is_not_known_counts_as_nothing() -> None:
    assert log_ratio(0.0, 2.0) == 0.0
    assert log_ratio(2.0, 0.0) == 0.0
    table = columns((FeatureSpec("a", "is named"),), {"a": [math.nan, math.inf, 1.0]}, 3)
    assert table[:, 0].tolist() == [0.0, LIMIT, 1.0]


def test_features_do_not_depend_on_the_units_of_loss_or_gradient() -> None:
    point = hand_made()
    scaled = changed(
        point, signals=tuple(structs.replace(s, gradient_norm=7.0 * s.gradient_norm) for s in point.signals),
        train_losses=tuple(7.0 * x for x in point.run.train_losses), held_out_loss=7.0 * 1.2,
    )  # fmt: skip
    one, two = BUILDER.build(point).graph_data, BUILDER.build(scaled).graph_data
    torch.testing.assert_close(one.x, two.x)
    for name in ("loss_drop", "loss_slope", "loss_noise", "gap"):
        assert column(point, "global_features", name) == pytest.approx(
            column(scaled, "global_features", name), abs=1e-6
        )


def test_a_new_kind_of_layer_is_a_node() -> None:
    with_one = hand_made(
        topology=structs.replace(TOPOLOGY, layers=(*TOPOLOGY.layers, layer("odd", 4, 4, type="Mine")))
    )
    assert BUILDER.build(with_one).node_names == ["in", "a", "b", "out", "odd"]
