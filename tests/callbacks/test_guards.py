"""How far seeds step: while they are young, and for good."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper import attach
from esper.callbacks.guards import Guards
from esper.kasmina.seed import Seed


def planted(*, fossilised: bool) -> tuple[nn.Sequential, Seed, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    body = attach(model, torch.randn(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seed = body.germinate("parallel:0", "lowrank", 2)
    body.register(optimizer)
    for _ in range(4 if fossilised else 3):
        seed.advance()
    return model, seed, optimizer


def moved(model: nn.Module, seed: Seed, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """How far a host weight and a seed's weight go under gradients of one."""
    host, grown = model.get_submodule("2").weight, seed.branch.A.weight
    before = host.detach().clone(), grown.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return float((before[0] - host).mean().detach()), float((before[1] - grown).mean().detach())


@pytest.mark.parametrize(
    ("birth", "lifelong", "young", "old"),
    [(1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 0.5, 1.0), (1.0, 0.25, 0.25, 0.25), (0.5, 0.25, 0.125, 0.25)],
)
def test_seeds_step_by_their_own_factors_and_the_host_by_none(
    birth: float, lifelong: float, young: float, old: float
) -> None:
    for fossilised, factor in ((False, young), (True, old)):
        model, seed, optimizer = planted(fossilised=fossilised)
        guards = Guards(birth, lifelong)
        guards.follow([optimizer], [seed])
        host, grown = moved(model, seed, optimizer)
        assert host == pytest.approx(1.0, rel=1e-5)
        assert grown == pytest.approx(factor, rel=1e-5)


def test_a_seed_that_fossilises_keeps_the_lifelong_factor_and_loses_the_other() -> None:
    model, seed, optimizer = planted(fossilised=False)
    guards = Guards(0.5, 0.5)
    guards.follow([optimizer], [seed])
    assert moved(model, seed, optimizer)[1] == pytest.approx(0.25, rel=1e-5)
    seed.advance()
    guards.follow([optimizer], [seed])
    assert moved(model, seed, optimizer)[1] == pytest.approx(0.5, rel=1e-5)
    guards.follow([optimizer], [])  # culled
    assert moved(model, seed, optimizer)[1] == pytest.approx(1.0, rel=1e-5)
    guards.remove()
    assert not guards.mounted
