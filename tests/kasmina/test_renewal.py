"""Recycling a layer of a live model by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.body import Body, attach
from esper.kasmina.renewal import recyclable, recycle_layer


class Mixed(nn.Module):
    """Layers of every kind that can and cannot be recycled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.next = nn.Conv2d(4, 4, 3, padding=1)
        self.flat = nn.Linear(4 * 16, 12)
        self.left = nn.Linear(12, 8)
        self.right = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.next(self.conv(x).relu()).relu().flatten(1)
        h = self.flat(h).relu()
        h = self.norm(self.left(h) + self.right(h))
        return self.head(torch.tanh(self.last(h)))


def images() -> Tensor:
    return torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def body() -> Body:
    torch.manual_seed(0)
    return attach(Mixed(), images())


def batches(body: Body) -> list[Callable[[], Tensor]]:
    return [lambda: body.model(images())]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("conv", ""),
        ("flat", ""),
        ("last", ""),
        ("next", "reshaped before 'flat'"),
        ("left", "read by 'norm', which is no Linear or Conv2d"),
        ("norm", "no Linear or Conv2d"),
        ("head", "output layer: its units are the answer"),
    ],
)
def test_layers_that_cannot_be_recycled_say_why(body, layer, reason):
    found = recyclable(body, layer)
    assert (reason in found) if reason else found == ""
    if reason:
        before = {name: value.clone() for name, value in body.model.state_dict().items()}
        with pytest.raises(GrowthError, match="cannot recycle units"):
            recycle_layer(body, layer, batches(body), optimizers=[], generator=torch.Generator())
        assert all(torch.equal(before[name], value) for name, value in body.model.state_dict().items())


@pytest.mark.parametrize(("layer", "readers"), [("flat", ("left", "right")), ("conv", ("next",))])
def test_dormant_units_are_renewed_and_the_function_stays_within_the_bound(body, layer, readers):
    model = body.model
    producer = model.get_submodule(layer)
    with torch.no_grad():
        producer.bias[1:3] = -60.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model(images()).square().mean().backward()
    optimizer.step()
    model.eval()
    before = model(images())
    report = recycle_layer(
        body, layer, batches(body), optimizers=[optimizer], generator=torch.Generator().manual_seed(2)
    )
    assert set(report.units) >= {1, 2}
    assert float((model(images()) - before).detach().abs().max()) <= 5 * report.max_change + 1e-5
    assert torch.equal(producer.bias[[1, 2]], torch.zeros(2))
    assert float(producer.weight[[1, 2]].detach().abs().max()) > 0
    for name in readers:
        weight = model.get_submodule(name).weight
        assert float(weight.detach()[:, [1, 2]].abs().max()) == 0
        assert float(optimizer.state[weight]["exp_avg"][:, [1, 2]].abs().max()) == 0
    first, second = (optimizer.state[producer.weight][name] for name in ("exp_avg", "exp_avg_sq"))
    assert float(first[[1, 2]].abs().max()) == 0
    others = [unit for unit in range(second.shape[0]) if unit not in report.units]
    torch.testing.assert_close(second[1], second[others].mean().expand_as(second[1]))  # no leap at first
    assert not model.training
    # they are alive: their activations differ from sample to sample
    h = torch.relu(producer(images() if layer == "conv" else torch.randn(32, 64)))
    assert float(h[:, 1:3].std().detach()) > 0


def test_units_that_a_seed_reads_too_are_left_alone(body):
    seed = body.germinate("parallel:left", "bottleneck", 2)
    reason = recyclable(body, "flat")
    assert f"seeds {seed.seed_id} read the units of 'flat' too" in reason
    body.cull(seed)
    assert recyclable(body, "flat") == ""


def test_a_layer_without_dormant_units_is_not_touched(body):
    before = {name: value.clone() for name, value in body.model.state_dict().items()}
    with torch.no_grad():
        body.model.last.bias.fill_(1.0)
        before["last.bias"].fill_(1.0)
    report = recycle_layer(body, "last", batches(body), optimizers=[], generator=torch.Generator())
    assert report.units == ()
    assert all(torch.equal(before[name], value) for name, value in body.model.state_dict().items())
