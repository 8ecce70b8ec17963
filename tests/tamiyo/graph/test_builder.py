"""The graph as a whole: equivariance, sizes from nothing to 10 000 nodes, batches, signals alone."""

from __future__ import annotations

import time

import pytest
import torch
from graph_states import SEED, TOPOLOGY, body_of, hand_made, layer, place, signal, state_of
from msgspec import json, structs

from esper.errors import ConfigError
from esper.kasmina.topology import Edge, ModelTopology
from esper.tamiyo.geometric import Batch
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint
from esper.tamiyo.graph.features import CANDIDATE_FEATURES, GLOBAL_FEATURES
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point

BUILDER = ModelGraphBuilder()


def by_name(state: ModelGraphState) -> tuple[dict[str, list[float]], dict[tuple[str, str], list[float]]]:
    graph, names = state.graph_data, state.node_names
    edges = {
        (names[int(u)], names[int(v)]): [round(x, 5) for x in row.tolist()]
        for (u, v), row in zip(graph.edge_index.T, graph.edge_attr, strict=True)
    }
    return {
        name: [round(x, 5) for x in row.tolist()] for name, row in zip(names, graph.x, strict=True)
    }, edges


def reordered(topology: ModelTopology, seed: int) -> ModelTopology:
    """The layers in another order that has producers first; the edges in any."""
    generator = torch.Generator().manual_seed(seed)
    left, found = list(topology.layers), []
    while left:
        placed = {x.name for x in found}
        ready = [x for x in left if all(e.source in placed for e in topology.producers(x.name))]
        chosen = ready[int(torch.randint(len(ready), (), generator=generator))]
        found.append(chosen)
        left.remove(chosen)
    order = torch.randperm(len(topology.edges), generator=generator).tolist()
    return structs.replace(topology, layers=tuple(found), edges=tuple(topology.edges[i] for i in order))


WIDE = ModelTopology(
    layers=(
        *(layer(f"in{i}", 8 + i, 6 + i, reads_input=True) for i in range(4)),
        layer("n", 6, 6, type="LayerNorm"),
        *(layer(f"mid{i}", 6, 4 + i) for i in range(3)),
        layer("out", 5, 3, is_output=True),
    ),
    edges=(
        *(Edge(f"in{i}", "n", ("AddBackward0",)) for i in range(4)),
        *(Edge("n", f"mid{i}", ("relu",) * (i > 0)) for i in range(3)),
        *(Edge(f"mid{i}", "out", ("gelu", "CatBackward0")) for i in range(3)),
        Edge("in0", "out", ()),
    ),
    refused={},
    num_parameters=500,
)
"""Four inputs into a sum, a norm, and three layers side by side."""


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_layers_changes_nothing_but_the_order_of_rows(seed: int) -> None:
    signals = tuple(
        signal(x.name, step, health_score=0.1 * (step + i % 5))
        for step in range(3)
        for i, x in enumerate(WIDE.layers)
    )
    seeds = (structs.replace(SEED, source="in0", target="mid1", site="bypass:in0->mid1"),)
    candidates = (
        WAIT,
        Candidate(action="grow", placements=(place("n", "mid2"), place("mid0", "out")), parameters=9),
        Candidate(action="cull", placements=(place("in0", "mid1"),), seed_id="s0"),
    )
    point = hand_made(topology=WIDE, signals=signals, seeds=seeds, candidates=candidates)
    shuffled = structs.replace(point, topology=reordered(WIDE, seed), signals=tuple(reversed(signals)))
    one, two = BUILDER.build(point), BUILDER.build(shuffled)
    if seed:
        assert list(one.node_names) != list(two.node_names)
    assert by_name(one) == by_name(two)
    a, b = one.graph_data, two.graph_data
    torch.testing.assert_close(a.global_features, b.global_features)
    torch.testing.assert_close(a.candidate_attr, b.candidate_attr)
    ends = [[[s.node_names[int(i)] for i in row] for row in s.graph_data.placement_index] for s in (one, two)]
    assert ends[0] == ends[1]


def test_relabelled_layers_give_the_same_features() -> None:
    point = hand_made()
    names = {"in": "zz", "a": "q.1", "n": "x", "b": "aa", "out": "0"}

    def renamed(text: str) -> str:
        return names.get(text, text)

    topology = structs.replace(
        TOPOLOGY,
        layers=tuple(structs.replace(x, name=names[x.name]) for x in TOPOLOGY.layers),
        edges=tuple(
            structs.replace(e, source=names[e.source], target=names[e.target]) for e in TOPOLOGY.edges
        ),
    )
    other = hand_made(
        topology=topology,
        signals=tuple(structs.replace(s, layer_id=renamed(s.layer_id)) for s in point.signals),
        seeds=tuple(structs.replace(s, source=renamed(s.source), target=renamed(s.target)) for s in point.run.seeds),
        candidates=tuple(
            structs.replace(c, placements=tuple(
                structs.replace(p, source=renamed(p.source), target=renamed(p.target)) for p in c.placements
            )) for c in point.candidates
        ),
    )  # fmt: skip
    one, two = BUILDER.build(point).graph_data, BUILDER.build(other).graph_data
    for key in one.keys():  # noqa: SIM118
        assert (
            one[key] is two[key] or one[key] == two[key]
            if key == "num_nodes"
            else torch.equal(one[key], two[key])
        )


def test_a_point_survives_the_wire() -> None:
    point = decision_point(state_of(body_of("cnn"), flops_left=1e12), History(), price=0.1)
    again = json.decode(json.encode(point), type=DecisionPoint)
    assert again == point
    assert by_name(BUILDER.build(again)) == by_name(BUILDER.build(point))


def test_shapes_and_masks() -> None:
    state = BUILDER.build(hand_made())
    graph = state.graph_data
    assert list(graph.x.shape) == [4, 16]
    assert list(graph.edge_attr.shape) == [graph.edge_index.shape[1], 8] == [4, 8]
    assert list(graph.global_features.shape) == [1, len(GLOBAL_FEATURES)]
    assert list(graph.candidate_attr.shape) == [7, len(CANDIDATE_FEATURES)]
    assert state.mask.tolist() == [True] * 6 + [False]
    assert graph.placement_candidate.tolist() == [1, 1, 2, 3, 4, 5, 6]
    assert graph.placement_index.T.tolist() == [[0, 1], [1, 2], [1, 2], [0, 3], [1, 1], [0, 1], [0, 1]]
    assert state.global_metrics["train_loss"] == 1.0
    assert state.global_metrics["num_layers"] == 4.0
    assert state.health_trends["a"] == pytest.approx(-0.02)
    assert state.point is not None


def test_a_seed_that_leads_around_layers_adds_an_edge() -> None:
    around = structs.replace(SEED, source="in", target="out", blueprint="shortcut")
    graph = BUILDER.build(hand_made(seeds=(SEED, around))).graph_data
    assert graph.edge_index.T.tolist()[-1] == [0, 3]
    assert graph.edge_attr.shape[0] == 5
    assert graph.edge_attr[:, -1].gt(0).tolist() == [True, False, False, False, True]


def test_batches_shift_what_counts_nodes_and_candidates() -> None:
    one, two = BUILDER.build(hand_made()).graph_data, BUILDER.build(hand_made(seeds=())).graph_data
    batch = Batch.from_data_list([one, two])
    assert batch.candidate_batch.tolist() == [0] * 7 + [1] * 7
    assert batch.placement_index[0].tolist() == one.placement_index[0].tolist() + [
        i + 4 for i in two.placement_index[0].tolist()
    ]
    assert batch.placement_candidate[-1] == 13


def empty(graph: CandidateGraph) -> list[int]:
    return [graph.x.shape[0], graph.edge_index.shape[1], graph.candidate_attr.shape[0]]


def test_nothing_and_a_single_layer_are_graphs_too() -> None:
    nothing = ModelTopology(layers=(), edges=(), refused={}, num_parameters=0)
    bare = hand_made(topology=nothing, signals=(), seeds=(), candidates=(WAIT,))
    assert empty(BUILDER.build(bare).graph_data) == [0, 0, 1]
    single = structs.replace(nothing, layers=(layer("only", 4, 2, is_output=True, reads_input=True),))
    grow = Candidate(action="grow", placements=(place("only", "only", kind="parallel"),))
    state = BUILDER.build(hand_made(topology=single, seeds=(), candidates=(WAIT, grow)))
    assert empty(state.graph_data) == [1, 0, 2]
    batch = Batch.from_data_list([BUILDER.build(bare).graph_data, state.graph_data])
    assert empty(batch) == [1, 0, 3]
    assert empty(BUILDER.build_model_graph([]).graph_data) == [0, 0, 1]


def test_ten_thousand_layers() -> None:
    n = 10_000
    layers = tuple(layer(str(i), 8, 8 + i % 3, is_output=i == n - 1, reads_input=i == 0) for i in range(n))
    edges = tuple(Edge(str(i), str(i + 1), ("relu",)) for i in range(n - 1))
    topology = ModelTopology(layers=layers, edges=edges, refused={}, num_parameters=n * 64)
    signals = tuple(signal(str(i), 0) for i in range(n))
    point = hand_made(topology=topology, signals=signals, seeds=(), candidates=(WAIT,))
    state = BUILDER.build(point)
    assert list(state.graph_data.x.shape) == [n, 16]
    assert state.graph_data.edge_index.shape[1] == n - 1
    started = time.perf_counter()
    BUILDER.build(point)
    assert time.perf_counter() - started < 2.0  # some 60 ms; this machine may be busy


def test_signals_alone_give_a_chain_with_a_choice_at_every_layer() -> None:
    signals = [
        signal("b", 1),
        signal("a", 1),
        signal("b", 2, health_score=0.0),
        signal("b", 2, "s1"),
        signal("a", 3),
    ]
    state = BUILDER.build_model_graph(signals)
    assert list(state.node_names) == ["b", "a"]
    assert state.graph_data.edge_index.tolist() == [[0], [1]]
    assert [(c.action, c.placements[0].target if c.placements else "", c.seed_id) for c in state.candidates] == [
        ("wait", "", ""), ("grow", "b", ""), ("recycle", "b", ""), ("grow", "a", ""), ("recycle", "a", ""),
        ("cull", "b", "s1"), ("hold", "b", "s1"),
    ]  # fmt: skip
    assert all(p.site == "" and p.blueprint == "" for c in state.candidates for p in c.placements)
    assert state.topology is None
    assert state.point is None
    assert state.timestamp == 3.0
    assert state.global_metrics["min_health"] == pytest.approx(0.4)


def test_signals_with_a_topology_keep_its_layers_and_window() -> None:
    signals = [signal("a", i, health_score=0.1 * (i < 5)) for i in range(10)]
    state = BUILDER.build_model_graph(signals, TOPOLOGY, window_size=3)
    assert list(state.node_names) == ["in", "a", "b", "out"]
    assert state.topology is TOPOLOGY
    assert state.graph_data.x[1, 1] == 0.0
    assert "mean health" in state.problematic_layers["a"]
    known = BUILDER.build_model_graph(signals, TOPOLOGY, run=hand_made().run)
    assert known.global_metrics["train_loss"] == 1.0


def test_other_dimensions_are_refused_with_the_reason() -> None:
    with pytest.raises(
        ConfigError, match=r"node_feature_dim=16 and edge_feature_dim=8, got 32 and 8: every feature"
    ):
        ModelGraphBuilder(node_feature_dim=32)
    with pytest.raises(ConfigError, match="at least 1 signal, got 0"):
        BUILDER.build_model_graph([], window_size=0)
