"""The gradients by which a seed learns without its host noticing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esper.kasmina.autograd import all_finite, guard_gradient, guarded_add, isolate

NAN, INF = float("nan"), float("inf")


def randn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_isolate_passes_the_host_through_bit_for_bit():
    y, s, g = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2, grad=False)
    out = isolate(y, s, 0.1)
    assert torch.equal(out, y)
    out.backward(g)
    assert torch.equal(y.grad, g)


def test_isolate_gives_the_seed_the_gradient_of_its_trust_region_objective():
    y, s, g = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2, grad=False)
    isolate(y, s, 0.1).backward(g)
    wanted = s.detach().clone().requires_grad_()
    objective = (g * wanted).sum() + g.norm() / (2 * 0.1 * y.detach().norm()) * wanted.square().sum()
    objective.backward()
    torch.testing.assert_close(s.grad, wanted.grad)


def test_descending_that_gradient_ends_at_a_step_of_the_given_length():
    y, g = randn(8, 3), randn(8, 3, seed=2, grad=False)
    s = torch.zeros(8, 3, requires_grad=True)
    rate = 0.5 * 0.1 * float(y.detach().norm() / g.norm())  # half the inverse curvature
    for _ in range(60):
        s.grad = None
        isolate(y, s, 0.1).backward(g)
        with torch.no_grad():
            s -= rate * s.grad
    torch.testing.assert_close(s.detach(), -0.1 * y.detach().norm() * g / g.norm())


def test_the_first_gradient_of_a_silent_seed_is_the_host_s():
    y, g = randn(4, 3), randn(4, 3, seed=2, grad=False)
    s = torch.zeros(4, 3, requires_grad=True)
    isolate(y, s, 0.1).backward(g)
    assert torch.equal(s.grad, g)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_broken_seed_leaves_value_and_host_gradient_alone(bad):
    y, g = randn(4, 3), randn(4, 3, seed=2, grad=False)
    s = torch.full((4, 3), bad, requires_grad=True)
    out = isolate(y, s, 0.1)
    out.backward(g)
    assert torch.equal(out, y)
    assert torch.equal(y.grad, g)


def test_an_activation_in_place_may_follow():
    y, s = randn(4, 3), randn(4, 3, seed=1)
    value = y.detach().clone()
    out = torch.relu_(isolate(y * 1.0, s, 0.1))
    out.sum().backward()
    assert torch.equal(y.detach(), value)
    assert torch.equal(y.grad, (value > 0).float())


def test_isolate_of_a_silent_host_stays_finite():
    y, s = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    isolate(y, s, 0.1).sum().backward()
    assert torch.isfinite(s.grad).all()


def test_isolate_of_a_frozen_host_still_teaches_the_seed():
    y, s = randn(4, 3, grad=False), randn(4, 3, seed=1)
    isolate(y, s, 0.1).sum().backward()
    assert s.grad.abs().sum() > 0


def test_isolate_keeps_low_precision():
    y, s = (
        randn(4, 3).detach().bfloat16().requires_grad_(),
        randn(4, 3, seed=1).detach().bfloat16().requires_grad_(),
    )
    out = isolate(y, s, 0.1)
    out.sum().backward()
    assert (out.dtype, y.grad.dtype, s.grad.dtype) == (torch.bfloat16,) * 3


def test_isolate_works_under_function_transforms():
    y, s = randn(4, 3, grad=False), randn(4, 3, seed=1, grad=False)
    host, seed = torch.func.grad(lambda a, b: isolate(a, b, 0.1).square().sum(), argnums=(0, 1))(y, s)
    assert torch.equal(host, 2 * y)
    assert not torch.equal(seed, 2 * y)


def test_guard_gradient_is_the_identity_for_a_sound_gradient():
    x, g = randn(4, 3), randn(4, 3, seed=2, grad=False)
    out = guard_gradient(x)
    out.backward(g)
    assert torch.equal(out, x)
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_guard_gradient_drops_a_broken_gradient_whole(bad):
    x, g = randn(4, 3), randn(4, 3, seed=2, grad=False)
    g[1, 2] = bad
    guard_gradient(x).backward(g)
    assert torch.equal(x.grad, torch.zeros(4, 3))


def test_guarded_add_is_a_weighted_sum():
    y, s, alpha = randn(4, 3), randn(4, 3, seed=1), torch.tensor(0.25)
    out = guarded_add(y, s, alpha)
    torch.testing.assert_close(out, y + 0.25 * s)
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones(4, 3))
    assert torch.equal(s.grad, torch.full((4, 3), 0.25))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_guarded_add_drops_a_broken_contribution_whole(bad):
    y, s = randn(4, 3), randn(4, 3, seed=1, grad=False)
    s[0, 0] = bad
    s.requires_grad_()
    out = guarded_add(y, s, torch.tensor(1.0))
    assert torch.equal(out, y)
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones(4, 3))
    assert torch.equal(s.grad, torch.zeros(4, 3))


def test_guarded_add_keeps_the_host_s_dtype():
    y, s = randn(4, 3).detach().bfloat16(), randn(4, 3, seed=1).detach().bfloat16()
    assert guarded_add(y, s, torch.tensor(0.5)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_finite_finds_every_nan_and_inf_and_no_large_sum(dtype: torch.dtype) -> None:
    x = torch.full((300, 400), 60_000.0, dtype=dtype)  # far more than float16 can add up
    assert bool(all_finite(x))
    for bad in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.nan, math.inf]):
        y = x.clone()
        y.view(-1)[[7 * (i + 1) for i in range(len(bad))]] = torch.tensor(bad, dtype=dtype)
        assert not bool(all_finite(y)), bad
    assert bool(all_finite(torch.empty(0, dtype=dtype)))
    assert not all_finite(x.float().requires_grad_(True)).requires_grad
