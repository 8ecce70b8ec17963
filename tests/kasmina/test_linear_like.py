"""Layers that are linear by another name carry parallel seeds, and their weights take low-rank ones in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.export import export_with_report
from esper.kasmina.layer import swap_class
from esper.kasmina.linear_like import as_weight_of, features
from esper.kasmina.probes import ProbeRunner


class Conv1D(nn.Module):
    """As transformers has it: a linear layer whose weight is [inputs, outputs]."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.2))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Linear(nn.Module):
    """As torch-geometric has it."""

    __module__ = "torch_geometric.nn.dense.linear"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels).normal_(std=0.2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Other(Linear):
    """Of a library that nothing is known of."""

    __module__ = "somewhere.else"


def test_features() -> None:
    assert features(nn.Linear(3, 5)) == features(Conv1D(5, 3)) == features(Linear(3, 5)) == (3, 5)
    assert features(Other(3, 5)) is features(nn.Conv2d(3, 5, 1)) is features(nn.LayerNorm(3)) is None
    swapped = Conv1D(5, 3)
    swap_class(swapped)
    assert features(swapped) == (3, 5)
    matrix = torch.randn(5, 3)
    assert as_weight_of(Conv1D(5, 3), matrix).shape == (3, 5)
    assert as_weight_of(Linear(3, 5), matrix) is matrix


@pytest.mark.parametrize("make", [lambda: Conv1D(4, 4), lambda: Linear(4, 4)])
def test_a_low_rank_seed_is_merged_the_right_way_round(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh(), make())  # square: the wrong way round would fit as well
    x = torch.randn(6, 4)
    body = esper.attach(model, x)
    assert [site.name for site in body.sites] == ["parallel:0", "parallel:2"]
    seed = body.germinate("parallel:0", "lowrank", 2)
    seed.enter("fossilized", 1.0)
    nn.init.normal_(seed.branch.B.weight)
    plain, report = export_with_report(model, x)
    assert report.folded == (seed.seed_id,)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in model.named_parameters() if "esper" not in name
    ]


def test_their_health_and_their_seeds_gradients_are_measured() -> None:
    model = nn.Sequential(Conv1D(4, 4), nn.Tanh(), Conv1D(3, 4))
    x = torch.randn(6, 4)
    body = esper.attach(model, x)
    seed = body.germinate("parallel:0", "bottleneck")
    seed.enter("training", 0.0)
    probes = ProbeRunner(body)
    probes.begin()
    assert probes.active
    model(x).square().mean().backward()
    probes.note_gradients()
    signals = probes.end(step=1, epoch=0)
    assert {signal.layer_id for signal in signals} == {"0", "2"}
    assert seed.record.facts["gradient_norm"] > 0
