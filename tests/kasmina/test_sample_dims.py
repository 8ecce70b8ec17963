"""Where samples are is found by experiment, and seeds never mix them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import GrowthError
from esper.kasmina.body import mean_output
from esper.kasmina.sample_dims import measure_sample_dims
from esper.kasmina.topology import ModelTopology
from esper.kasmina.trace import trace

RING = torch.stack([torch.arange(9), (torch.arange(9) + 1) % 9])
"""Edges of a graph of nine nodes."""


def measured(model: nn.Module, batch: Any) -> ModelTopology:
    def run(given: Any) -> Any:
        return model(*given) if isinstance(given, tuple) else model(given)

    return measure_sample_dims(model, trace(model, lambda: mean_output(run(batch))), run, batch)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """A recurrent net with torch's layout (T, B, F) inside, over data (B, T, F)."""

    def __init__(self, *, swap: bool = True, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.swap, self.pool = swap, pool
        self.inner = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.swap else x
        h, _ = self.lstm(self.inner(x))
        if self.pool:
            return self.head(h[-1])
        return self.head(h)


class Graph(nn.Module):
    """Nodes pass messages along edges; nodes, or the one graph, are classified."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.pool = nn.Linear(4, 6), nn.Linear(6, 3), pool

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x).relu()
        h = h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        return self.second(h.mean(0, keepdim=True) if self.pool else h)


class Picky(nn.Module):
    """Takes one batch and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.equal(x, draw(6, 4)):
            raise ValueError("these are not my data")
        return self.layer(x)


class Translator(nn.Module):
    """Tokens of the target look at tokens of the source: two lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory, query = self.source(x), self.target(y)
        return self.head(query + (query @ memory.mT).softmax(-1) @ memory)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_samples_in_the_second_dimension(size: int) -> None:
    topology = measured(Tagger(), draw(size, 7, 4))
    assert topology.layout_measured
    assert topology.layout_problem == ""
    for name in ("inner", "lstm", "head"):
        layer = topology.layer(name)
        assert (layer.input_samples, layer.output_samples) == (1, 1)
        assert layer.output_shape[0] == 7


def test_samples_in_the_first_dimension_and_equal_samples() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for batch in (draw(3, 1, 6, 6), torch.zeros(2, 1, 6, 6), torch.ones(1, 1, 6, 6)):
        topology = measured(net, batch)
        assert [layer.output_samples for layer in topology.layers] == [0, 0]
        assert [layer.output_shape for layer in topology.layers] == [(4, 4, 4), (3,)]


def test_whole_numbers_stay_in_the_range_that_the_data_have() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 6), nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    for tokens in ([[0, 3, 3], [3, 1, 2]], [[3, 0, 1]], [[3, 3], [3, 3]]):
        assert measured(Words(), torch.tensor(tokens)).layer("head").output_samples == 0


@pytest.mark.parametrize(
    ("make", "batch", "problem"),
    [
        (lambda: Tagger(swap=False), draw(7, 3, 4), "layer 'lstm' mixes"),
        (Graph, (draw(9, 4), RING), "layer 'second' mixes"),
        (Picky, draw(6, 4), "does not run on part of a batch: ValueError: these are not my data"),
    ],
)
def test_where_the_first_dimension_does_not_count_samples_nothing_is_known(
    make: Callable[[], nn.Module], batch: Any, problem: str
) -> None:
    topology = measured(make(), batch)
    assert problem in topology.layout_problem
    assert {layer.output_samples for layer in topology.layers} == {None}


def test_lengths_that_happen_to_be_equal_are_told_apart() -> None:
    topology = measured(Translator(), (draw(3, 5, 4), draw(3, 5, 4)))
    lengths = {layer.name: layer.output_lengths for layer in topology.layers}
    assert lengths["target"] == lengths["head"] == (15, 12)
    assert lengths["source"] == (12, 15)


def test_nothing_but_the_topology_comes_out_of_the_experiment() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    batch = draw(6, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    topology = trace(model, lambda: model(batch).mean())
    random = torch.get_rng_state()
    measure_sample_dims(model, topology, model, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(batch, draw(6, 4))


@pytest.mark.parametrize("pool", [False, True])
def test_no_seed_lets_a_sample_see_another(pool: bool) -> None:
    model, x = Tagger(pool=pool), draw(3, 7, 4)
    other = torch.cat([draw(1, 7, 4) + 1, x[1:]])
    body = esper.attach(model, x)
    offered = {blueprint for site in body.sites for blueprint in site.blueprints}
    assert {"attention", "shortcut", "bottleneck", "lowrank", "norm"} <= offered
    for site in body.sites:
        for blueprint in site.blueprints:
            seed = body.germinate(site, blueprint)
            seed.enter("fossilized", 1.0)
            with torch.no_grad():
                plain = model.eval()(x)
                for parameter in seed.branch.parameters():
                    nn.init.normal_(parameter)
                a, b = model.eval()(x), model(other)
                assert not torch.allclose(a, plain)
            dim = 0 if pool else 1
            assert torch.equal(a.narrow(dim, 1, 2), b.narrow(dim, 1, 2)), (site.name, blueprint)
            body.cull(seed)


def test_what_needs_to_know_is_refused_where_nothing_is_known() -> None:
    body = esper.attach(Tagger(swap=False), draw(7, 3, 4))
    assert not any("attention" in site.blueprints for site in body.sites)
    with pytest.raises(GrowthError, match="not known which dimension of its output counts samples"):
        body.germinate("parallel:head", "attention")
    pooled = esper.attach(Tagger(swap=False, pool=True), draw(7, 3, 4))
    assert not any("shortcut" in site.blueprints for site in pooled.sites)


def test_no_bypass_between_places_with_other_numbers_of_rows() -> None:
    nodes = esper.attach(Graph(), (draw(9, 4), RING))
    assert "bypass:first->second" in {site.name for site in nodes.sites}
    graph = esper.attach(Graph(pool=True), (draw(9, 4), RING))
    assert not any(site.kind == "bypass" for site in graph.sites)
    tokens = esper.attach(Translator(), (draw(3, 5, 4), draw(3, 5, 4)))
    assert not any(site.source == "source" and site.kind == "bypass" for site in tokens.sites)
