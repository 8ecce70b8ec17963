"""Attention against torch-geometric's, dropout of channels, layers on degenerate graphs."""

from __future__ import annotations

import pytest
import torch

from esper.tamiyo.geometric import GCNConv, TransformerConv
from esper.tamiyo.network.layers import (
    AttentionConv,
    ChannelDropout,
    Flow,
    GraphLayer,
    Noise,
    Rows,
    pool,
)

H, EDGE = 8, 3
EDGES = torch.tensor([[0, 1, 2, 0, 3], [1, 2, 3, 3, 0]])
ATTR = torch.randn(5, EDGE, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
ROWS = Rows(torch.zeros(5, dtype=torch.long), 1)


def layer(**options: float) -> GraphLayer:
    torch.manual_seed(0)
    return GraphLayer(H, EDGE + 1, 2, **{"attention_dropout": 0.0, "feature_dropout": 0.0, **options})


def test_attention_is_transformer_conv() -> None:
    torch.manual_seed(0)
    ours = AttentionConv(H, EDGE, 2, 0.0)
    theirs = TransformerConv(H, H // 2, heads=2, edge_dim=EDGE)
    for name in ("query", "key", "value", "edge", "skip"):
        getattr(theirs, f"lin_{name}").load_state_dict(getattr(ours, name).state_dict())
    torch.testing.assert_close(ours(X, EDGES, ATTR), theirs(X, EDGES, ATTR))


def test_samples_between_rows_and_channels_are_passed_through_apart() -> None:
    many = torch.randn(5, 3, H, generator=torch.Generator().manual_seed(2))
    flow = Flow.both_ways(EDGES, ATTR, 5)
    together = layer()(many, flow, ROWS, None)
    apart = torch.stack([layer()(many[:, s], flow, ROWS, None) for s in range(3)], 1)
    torch.testing.assert_close(together, apart)


def test_convolution_is_gcn_conv_on_the_undirected_graph() -> None:
    graph_layer = layer()
    theirs = GCNConv(H, H)
    theirs.load_state_dict(graph_layer.convolution.state_dict())
    flow = Flow.both_ways(EDGES, ATTR, 5)
    both = torch.cat([EDGES, EDGES.flip(0)], 1)
    torch.testing.assert_close(graph_layer.convolution(X, flow.gcn_index, flow.gcn_weight), theirs(X, both))


def test_a_layer_hears_from_those_it_feeds_and_tells_them_from_those_that_feed_it() -> None:
    edges, attr = torch.tensor([[0], [1]]), torch.zeros(1, EDGE)
    x = X[:2]
    moved = torch.stack([x[0], -x[1]])
    before, after = (layer()(h, Flow.both_ways(edges, attr, 2), ROWS, None) for h in (x, moved))
    assert not torch.allclose(before[0], after[0])
    reverse = layer()(x, Flow.both_ways(edges.flip(0), attr, 2), ROWS, None)
    assert not torch.allclose(before, reverse)


@pytest.mark.parametrize("num_nodes", [0, 1, 3])
def test_without_edges_every_node_stands_alone(num_nodes: int) -> None:
    flow = Flow.both_ways(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, EDGE), num_nodes)
    out = layer()(X[:num_nodes], flow, ROWS, None)
    assert out.shape == (num_nodes, H)
    assert torch.isfinite(out).all()


def test_dropout_drops_the_same_channels_of_all_rows_of_a_graph() -> None:
    torch.manual_seed(0)
    rows = Rows(torch.tensor([0, 0, 0, 1, 1]), 2)
    out = ChannelDropout(0.5)(torch.ones(5, 32), rows, Noise())
    assert torch.equal(out[0], out[2])
    assert torch.equal(out[3], out[4])
    assert not torch.equal(out[0], out[3])
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_sampled_dropout_draws_one_mask_a_sample_from_its_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dropout = ChannelDropout(0.5)
    out = dropout(torch.ones(5, 32), ROWS, Noise(torch.Generator().manual_seed(3), 4))
    again = dropout(torch.ones(5, 4, 32), ROWS, Noise(torch.Generator().manual_seed(3), 4))
    assert out.shape == (5, 4, 32)
    assert torch.equal(out, again)
    assert torch.equal(out[0], out[4])
    assert not torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_without_noise_or_rate_does_nothing() -> None:
    assert ChannelDropout(0.5)(X, ROWS, None) is X
    assert ChannelDropout(0.0)(X, ROWS, Noise()) is X


def test_attention_weights_are_dropped_in_training_alone() -> None:
    attention = AttentionConv(H, EDGE, 2, 0.9)
    plain = attention(X, EDGES, ATTR)
    torch.manual_seed(0)
    assert not torch.equal(attention(X, EDGES, ATTR, Noise()), plain)
    assert torch.equal(attention(X, EDGES, ATTR, Noise(torch.Generator())), plain)


def test_pooling_a_graph_without_rows_gives_zeros() -> None:
    pooled = pool(torch.ones(2, 3), Rows(torch.tensor([0, 0]), 2))
    assert pooled.tolist() == [[1.0] * 6, [0.0] * 6]
