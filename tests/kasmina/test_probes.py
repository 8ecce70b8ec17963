"""Health of a live model, taken over one training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.body import Body, attach
from esper.kasmina.layer import SeedLayer
from esper.kasmina.probes import ProbeRunner
from esper.kasmina.statistics import dead_unit_ratio, dormancy, gradient_norm, update_ratio


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.head(self.second(h).relu_().flatten(1))


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def step(body: Body, probes: ProbeRunner | None, x: Tensor, number: int = 1, lr: float = 0.1) -> list[Any]:
    optimizer = torch.optim.SGD(body.model.parameters(), lr=lr)
    if probes is not None:
        probes.begin()
    body.model(x).square().mean().backward()
    if probes is not None:
        probes.note_gradients()
    optimizer.step()
    signals = [] if probes is None else probes.end(step=number, epoch=2)
    optimizer.zero_grad()
    return signals


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_figures_are_those_of_the_layer_behind_its_activation():
    model, x = dense(), batch(64, 5)
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # three units that never fire
    body = attach(model, x)
    h = model[1](model[0](x)).detach()
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    norm = gradient_norm(model[0].weight.grad, model[0].bias.grad)
    model.zero_grad()
    first, *_ = step(body, ProbeRunner(body), x)
    assert (first.layer_id, first.seed_id, first.step, first.epoch) == ("0", "", 1, 2)
    assert first.dead_neuron_ratio == pytest.approx(3 / 8) == float(dead_unit_ratio(h))
    assert first.dormancy == pytest.approx(float(dormancy(h)))
    assert first.activation_variance == pytest.approx(float(h.var(0, unbiased=False).mean()), rel=1e-5)
    assert first.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    assert first.update_ratio == pytest.approx(float(update_ratio(before, model[0].weight)), rel=1e-4)
    assert first.health_score < 1


@pytest.mark.parametrize(("make", "shape", "layers"), [(dense, (32, 5), 3), (ConvNet, (8, 1, 8, 8), 3)])
def test_every_dense_layer_and_seed_gets_a_signal_within_its_ranges(make, shape, layers):
    torch.manual_seed(0)
    model, x = make(), batch(*shape)
    body = attach(model, x)
    site = next(s for s in body.sites if s.kind == "bypass" and not s.long)
    seed = body.germinate(site, site.blueprints[0])
    seed.enter("blending", 0.5)
    probes = ProbeRunner(body)
    step(body, None, x)
    signals = step(body, probes, x)
    assert len([s for s in signals if not s.seed_id]) == layers
    (own,) = (s for s in signals if s.seed_id)
    assert (own.seed_id, own.layer_id) == (seed.seed_id, site.target)
    assert own.gradient_norm > 0
    assert seed.record.facts["output_ratio"] > 0
    for signal in signals:
        assert signal.activation_variance > 0
        for share in (signal.dead_neuron_ratio, signal.dormancy, signal.health_score):
            assert 0 <= share <= 1
        assert -1 <= signal.avg_correlation <= 1
        assert 0 < signal.effective_rank <= 64
        assert signal.error_count == 0
    carrier = next(s for s in signals if s.layer_id == site.target and not s.seed_id)
    assert (carrier.active_seeds, carrier.total_seeds) == (1, 1)
    assert probes.latency_ms > 0


def test_a_sampled_step_changes_no_bit_and_leaves_nothing_behind():
    torch.manual_seed(0)
    watched = ConvNet()
    torch.manual_seed(0)
    plain = ConvNet()
    x = batch(8, 1, 8, 8)
    body, other = attach(watched, x), attach(plain, x)
    probes = ProbeRunner(body)
    for number in range(3):
        step(body, probes, x, number)
        step(other, None, x)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert not probes.active
    assert all(m._esper_slot is None for m in watched.modules() if isinstance(m, SeedLayer))


def test_a_cancelled_step_leaves_no_observer():
    model, x = dense(), batch(16, 5)
    body = attach(model, x)
    probes = ProbeRunner(body)
    probes.begin()
    assert probes.active
    assert all(m._esper_slot is not None for m in model.modules() if isinstance(m, SeedLayer))
    model(x)
    probes.cancel()
    assert not probes.active
    assert all(m._esper_slot is None for m in model.modules() if isinstance(m, SeedLayer))
    assert probes.end(step=1, epoch=0) == []


def test_values_that_are_not_finite_are_counted_and_make_the_layer_sick():
    model, x = dense(), batch(16, 5)
    body = attach(model, x)
    bad = x.clone()
    bad[3, 2] = float("nan")
    signals = step(body, ProbeRunner(body), bad)
    assert all(signal.error_count > 0 for signal in signals)
    assert all(signal.health_score == 0 for signal in signals)


def test_a_frozen_layer_has_no_gradient_and_is_not_blamed_for_it():
    model, x = dense(), batch(32, 5)
    model[0].requires_grad_(False)
    body = attach(model, x)
    first, second, *_ = step(body, ProbeRunner(body), x)
    assert first.gradient_norm == 0 == first.update_ratio
    assert second.gradient_norm > 0
    assert first.health_score > 0.5


def test_scores_and_open_gates_are_handed_on():
    model, x = dense(), batch(32, 5)
    body = attach(model, x)
    seed = body.germinate("bypass:0->2", "widen", 3)
    seed.enter("training", 0.0)
    probes = ProbeRunner(body)
    probes.begin()
    model(x).square().mean().backward()
    probes.note_gradients()
    assert body.health() == []
    signals = probes.end(step=4, epoch=0, ready=[seed.seed_id], scores={"2": 1.5})
    assert body.health() == list(signals)
    assert {s.layer_id: s.expressivity for s in signals if not s.seed_id} == {"0": 0.0, "2": 1.5, "4": 0.0}
    assert [s.is_ready_for_transition for s in signals] == [False, False, False, True]
