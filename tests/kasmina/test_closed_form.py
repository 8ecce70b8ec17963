"""The closed-form start: TINY's product, its normalisation, and that it beats a random fan-in at first."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.closed_form import ClosedFormStart, closed_form_start


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int = 300, p: int = 10, c: int = 3, q: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = generator()
    A = torch.randn(n, p, generator=g) * torch.linspace(0.2, 3.0, p) + 0.5
    B = (A @ torch.randn(p, c, generator=g)).relu()
    return A, B, A @ torch.randn(p, q, generator=g) + torch.randn(n, q, generator=g)


def product(start: ClosedFormStart, count: int) -> Tensor:
    fan_in = torch.cat([start.weight_in, start.bias_in[:, None]], dim=1)
    return start.weight_out[:, :count] @ fan_in[:count]


def test_product_is_the_best_linear_map() -> None:
    """With as many units as outputs, W_out W_in is the least-squares fit of the residual gradient on A."""
    A, B, G = rows()
    start = closed_form_start(A, B, G, 5, generator=generator())
    ones = torch.ones(len(A), 1, dtype=torch.float64)
    A1, B1 = torch.cat([A.double(), ones], 1), torch.cat([B.double(), ones], 1)
    residual = G.double() - B1 @ torch.linalg.lstsq(B1, G.double()).solution
    best = torch.linalg.lstsq(A1, residual).solution.T
    torch.testing.assert_close(product(start, 5), best, rtol=1e-4, atol=1e-6)


def test_pre_activations_have_the_size_of_a_random_start() -> None:
    A, B, G = rows()
    start = closed_form_start(A, B, G, 5, generator=generator())
    z = A.double() @ start.weight_in.T + start.bias_in
    expected = 2.0 * A.double().square().sum(1).mean() / A.shape[1]
    torch.testing.assert_close(z.square().mean(0), expected.expand(5))


def test_units_beyond_the_rank_are_mirrored_then_random() -> None:
    A, B, G = rows(q=3)
    start = closed_form_start(A, B, G, 10, generator=generator())
    assert start.weight_in.shape == (10, 10)
    assert start.weight_out.shape == (3, 10)
    torch.testing.assert_close(start.weight_in[3:6], -start.weight_in[:3])
    torch.testing.assert_close(start.weight_out[:, 3:6], -start.weight_out[:, :3])
    assert torch.count_nonzero(start.weight_out[:, 6:]) == 0
    assert torch.count_nonzero(start.bias_in[6:]) == 0
    assert (start.weight_in[6:].abs().sum(1) > 0).all()
    assert (start.singular_values[:3].diff() <= 0).all()
    again = closed_form_start(A, B, G, 10, generator=generator())
    assert torch.equal(start.weight_in, again.weight_in)


def test_without_a_gradient_every_unit_is_random() -> None:
    A, B, G = rows()
    start = closed_form_start(A, B, torch.zeros_like(G), 400, generator=generator())
    assert torch.count_nonzero(start.weight_out) == 0
    assert float(start.weight_in.std()) == pytest.approx(math.sqrt(2 / 10), rel=0.05)


def test_refuses_unequal_rows() -> None:
    A, B, G = rows()
    with pytest.raises(GrowthError, match="same n >= 2"):
        closed_form_start(A, B[1:], G, 2, generator=generator())


def test_first_steps_on_the_fan_out_gain_more_than_from_random_fan_in() -> None:
    """Planted task: a trained host with 2 hidden units, a teacher with 24. Paired seeds, equal rates."""
    gains = [_gains(seed) for seed in range(6)]
    assert sum(closed > random for closed, random in gains) >= 5, gains
    assert sum(closed for closed, _ in gains) > 1.2 * sum(random for _, random in gains), gains


def _gains(seed: int) -> tuple[float, float]:
    """Return the loss decrease from 5 steps on the zero fan-out of 8 new units: closed form, He."""
    torch.manual_seed(seed)
    x = torch.randn(512, 20) * torch.linspace(0.3, 2.0, 20)
    teacher = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 6))
    with torch.no_grad():
        y = 5 * teacher(x)
    first, second = nn.Linear(20, 2), nn.Linear(2, 6)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(second(first(x).relu()), y).backward()
        optimizer.step()
    hidden = first(x).relu().detach()
    out = second(hidden).detach().requires_grad_()
    gradient = torch.autograd.grad(F.mse_loss(out, y), out)[0]
    start = closed_form_start(x, hidden, -512 * gradient, 8, generator=generator(seed))
    he = torch.randn(8, 20, generator=generator(100 + seed)) * math.sqrt(2 / 20)
    arms = [(start.weight_in.float(), start.bias_in.float()), (he, torch.zeros(8))]
    decreases = []
    for weight, bias in arms:
        new = F.linear(x, weight, bias).relu()
        fan_out = torch.zeros(6, 8, requires_grad=True)
        before = F.mse_loss(out, y)
        for _ in range(5):
            loss = F.mse_loss(out.detach() + F.linear(new, fan_out), y)
            step = torch.autograd.grad(loss, fan_out)[0]
            with torch.no_grad():
                fan_out -= 0.05 * step
        after = F.mse_loss(out + F.linear(new, fan_out), y)
        decreases.append(float((before - after).detach()))
    return decreases[0], decreases[1]
