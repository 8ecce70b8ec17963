"""The data flow of deep hosts: what is kept of it grows with the depth, not with its square."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.body import attach
from esper.kasmina.flow import EARLIEST, NEAREST
from esper.tamiyo.policies.shape import layers_in_series


class Residual(nn.Module):
    """An input layer, residual blocks of two layers, and a head."""

    def __init__(self, depth: int, *, branch_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.up = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.branch_first = branch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            y = down(up(h).relu())
            h = y + h if self.branch_first else h + y
        return self.head(h)


@pytest.mark.parametrize("branch_first", [False, True])
def test_edges_of_a_deep_residual_host_are_bounded_for_each_layer(branch_first: bool) -> None:
    depth = 50
    topology = attach(Residual(depth, branch_first=branch_first), torch.randn(2, 3)).topology
    kept = NEAREST + EARLIEST
    assert max(len(topology.producers(name)) for name in topology.layer_names) == kept
    sources = [edge.source for edge in topology.producers("head")]
    earliest = ["first", *(f"down.{i}" for i in range(EARLIEST - 1))]
    nearest = [f"down.{i}" for i in range(depth - NEAREST, depth)]
    assert sorted(sources) == sorted(earliest + nearest)
    assert layers_in_series(topology) == 2  # the shortest way, first -> head, is among what was kept
    assert [edge.source for edge in topology.producers("down.7")] == ["up.7"]


def test_a_shallow_residual_host_keeps_every_edge() -> None:
    depth = 12
    topology = attach(Residual(depth), torch.randn(2, 3)).topology
    edges = {(edge.source, edge.target) for edge in topology.edges}
    writers = ["first", *(f"down.{i}" for i in range(depth))]
    expected = {(f"up.{i}", f"down.{i}") for i in range(depth)}
    expected |= {(writer, f"up.{i}") for i in range(depth) for writer in writers[: i + 1]}
    assert edges == expected | {(writer, "head") for writer in writers}


def test_long_ways_are_cut_and_not_taken_for_known_operations() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            for _ in range(40):
                h = h.relu()
            return self.b(h)

    body = attach(Long(), torch.randn(2, 3))
    (edge,) = body.topology.edges
    assert len(edge.ops) == 32
    assert edge.ops[-1] == "..."
    assert "widen" not in body.site("bypass:a->b").blueprints


def test_what_is_worked_out_on_a_topology_does_not_travel() -> None:
    import copy

    import msgspec

    topology = attach(Residual(2), torch.randn(2, 3)).topology
    fresh = msgspec.convert(msgspec.to_builtins(topology), type(topology))
    assert topology.feeds("first", "up.0")
    assert not topology.feeds("up.0", "first")
    assert topology == fresh == copy.deepcopy(topology)
    with pytest.raises(KeyError, match="nowhere"):
        topology.layer("nowhere")


def test_long_bypasses_of_a_residual_host_are_sampled() -> None:
    body = attach(Residual(150), torch.randn(2, 3))
    long = [site for site in body.sites if site.long]
    assert 32 < len(long) <= 64
    assert {site.target for site in long} == {"head"}
    blocks = [int(site.source.rpartition(".")[2]) for site in long if site.source != "first"]
    assert blocks == sorted(blocks)
    assert max(b - a for a, b in itertools.pairwise([0, *blocks, 150])) <= 5  # spread, not the first few


def test_layers_that_the_data_hardly_reach_have_the_sample_dimension_of_what_feeds_them() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(
        *layers, nn.Linear(4, 2)
    )  # as torch initialises it, a signal fades within 20 layers
    body = attach(model, torch.randn(4, 4))
    assert {layer.output_samples for layer in body.topology.layers} == {0}
    assert body.site("bypass:0->120").long

    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(5, 4)
            self.dead, self.block, self.head = (
                nn.Linear(4, 4),
                nn.Sequential(nn.Linear(4, 4)),
                nn.Linear(4, 2),
            )
            nn.init.zeros_(self.dead.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = self.dead(x) + self.places(torch.arange(5))
            return self.head(self.block(h).relu())

    topology = attach(Fading(), torch.randn(4, 5, 4)).topology
    assert [topology.layer(name).input_samples for name in ("block.0", "head")] == [0, 0]
    assert topology.layer("places").output_samples is None
