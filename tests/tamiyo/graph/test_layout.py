"""Which layers are nodes, and what becomes of the ways between them."""

from __future__ import annotations

import numpy as np
import pytest
from graph_states import TOPOLOGY, body_of, chain_of, hand_made, layer, place, state_of
from msgspec import structs

from esper.errors import MessageError
from esper.kasmina.topology import Edge, ModelTopology
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.facts import WAIT, Candidate
from esper.tamiyo.graph.layout import Layout
from esper.tamiyo.policies.shape import hidden_layers


def named_edges(layout: Layout) -> dict[tuple[str, str], tuple[float, ...]]:
    pairs = zip(layout.source.tolist(), layout.target.tolist(), strict=True)
    return {
        (layout.names[u], layout.names[v]): tuple(way) for (u, v), way in zip(pairs, layout.ways, strict=True)
    }


def test_ways_through_layers_without_seeds_are_contracted() -> None:
    layout = Layout(TOPOLOGY)
    assert layout.names == ["in", "a", "b", "out"]
    assert named_edges(layout) == {  # passed, nonlinear, mixed, residual
        ("in", "a"): (0, True, False, False),
        ("a", "b"): (1, True, False, False),
        ("in", "b"): (0, False, False, True),
        ("b", "out"): (0, True, True, False),
    }
    assert layout.depth.tolist() == [0, 1, 2, 3]


def test_refused_layers_are_led_around_and_residual_streams_survive() -> None:
    layout = Layout(body_of("gpt").topology)
    ways = named_edges(layout)
    assert not any("norm" in name or name in ("tokens", "positions") for name in layout.names)
    assert ways["blocks.0.mlp.proj", "blocks.1.attn.qkv"] == (1, False, False, True)
    assert ways["blocks.0.attn.out", "head"][3]  # all the way along the stream
    refused = structs.replace(TOPOLOGY, refused={"a": "called twice"})
    assert named_edges(Layout(refused)) == {
        ("in", "b"): (0, False, False, True),  # the shorter way of two
        ("b", "out"): (0, True, True, False),
    }


def test_places_in_blocks_norms_and_parts_of_layers_find_their_nodes() -> None:
    layout = Layout(body_of("gpt").topology)
    ends = [layout.names[layout.node("blocks.1", reads=reads)] for reads in (True, False)]
    assert ends == ["blocks.1.attn.qkv", "blocks.1.mlp.proj"]
    assert layout.names[layout.node("blocks.0.norm1", reads=True)] == "blocks.0.attn.qkv"
    assert layout.names[layout.node("norm", reads=False)] == "blocks.1.mlp.proj"
    attention = ModelTopology(
        layers=(layer("attn", 4, 4, type="MultiheadAttention"),), edges=(), refused={}, num_parameters=1
    )
    assert Layout(attention).node("attn.out_proj", reads=False) == 0
    with pytest.raises(
        MessageError, match=r"expected a layer of the topology .4 seed layers., got|'elsewhere'"
    ):
        Layout(TOPOLOGY).node("elsewhere", reads=True)


def test_a_candidate_or_seed_at_an_unknown_layer_is_refused() -> None:
    grow = Candidate(action="grow", placements=(place("nowhere", "out"),))
    with pytest.raises(MessageError, match="'nowhere'"):
        ModelGraphBuilder().build(hand_made(candidates=(WAIT, grow)))


@pytest.mark.parametrize("family", ["mlp", "cnn", "gpt"])
def test_necks_agree_with_those_of_policies(family: str) -> None:
    state = state_of(body_of(family))
    layout = Layout(state.topology)
    necks = layout.necks(layout.widths)
    for hidden in hidden_layers(state):
        if family != "gpt":  # there the policies count embeddings and norms, which are no nodes
            assert np.exp(necks[layout.index[hidden.name]]) == pytest.approx(hidden.neck)


def test_edges_that_lead_backwards_and_to_themselves_do_no_harm() -> None:
    odd = structs.replace(
        TOPOLOGY, edges=(*TOPOLOGY.edges, Edge("out", "in"), Edge("a", "a"), Edge("n", "n"))
    )
    layout = Layout(odd)
    assert layout.depth.tolist() == [0, 1, 2, 3]
    assert ("out", "in") in named_edges(layout)
    assert np.isfinite(layout.necks(layout.widths)).all()


def test_a_chain_keeps_its_length() -> None:
    layout = Layout(chain_of(30).topology)
    assert layout.num_nodes == 30
    assert layout.depth.tolist() == list(range(30))
    assert layout.series == 30
