"""Expressivity of a live model's sites against an independent float64 computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.body import attach
from esper.kasmina.layer import SeedLayer
from esper.kasmina.scoring import estimate_flops, score_sites


def reference(A: Tensor, B: Tensor, G: Tensor, k: int) -> float:
    """GROWTH.md §1 written out, with symmetric inverse roots."""
    A, B, G = (m.detach().double() for m in (A, B, G))
    n = A.shape[0]
    ones = torch.ones(n, 1, dtype=torch.float64)
    A, B = torch.cat([A, ones], 1), torch.cat([B, ones], 1)
    moment = B.T @ B / n
    ridge = 1e-6 * moment.diagonal().mean() * torch.eye(B.shape[1], dtype=torch.float64)
    residual = G - B @ torch.linalg.solve(moment + ridge, B.T @ G / n)

    def root(M: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        keep = values >= 1e-6 * values[-1]
        return vectors[:, keep] @ torch.diag(values[keep].rsqrt()) @ vectors[:, keep].T

    Q = root(A.T @ A / n) @ (A.T @ residual / n) @ root(G.T @ G / n)
    return float(torch.linalg.svdvals(Q)[:k].square().sum())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_a_linear_site_agrees_with_the_formula_on_what_autograd_gives():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    x, labels = torch.randn(200, 7), torch.randint(0, 4, (200,))
    body = attach(model, x)
    scores = score_sites(
        body, lambda: F.cross_entropy(model(x), labels), body.sites, size=2, generator=generator()
    )
    h = model[1](model[0](x))
    z = model[2](h)
    z.retain_grad()
    logits = model[4](model[3](z))
    logits.retain_grad()
    F.cross_entropy(logits, labels).backward()
    G2, G4 = -200 * z.grad, -200 * logits.grad
    # float32 gradients from two different passes: agreement to about their rounding
    assert scores["bypass:0->2"].score == pytest.approx(reference(x, h, G2, 2), rel=1e-3)
    assert scores["bypass:2->4"].score == pytest.approx(reference(h, model[3](z), G4, 2), rel=1e-3)
    assert scores["bypass:0->4"].score == pytest.approx(reference(x, model[3](z), G4, 2), rel=1e-3)
    assert not any(name.startswith(("parallel", "stack")) for name in scores)


def test_a_convolution_agrees_on_its_centred_patches():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, padding=1))
    x, wanted = torch.randn(6, 2, 5, 5), torch.randn(6, 5, 5, 5)
    body = attach(model, x)
    (site,) = (s for s in body.sites if s.kind == "bypass")
    scores = score_sites(
        body, lambda: (model(x) - wanted).square().mean(), [site], size=3, generator=generator()
    )
    h = model[1](model[0](x))
    y = model[2](h)
    y.retain_grad()
    (y - wanted).square().mean().backward()

    def rows(image: Tensor) -> Tensor:
        return F.unfold(image, 3, padding=1).transpose(1, 2).flatten(0, 1)

    G = -6 * y.grad.flatten(2).transpose(1, 2).flatten(0, 1)
    assert scores[site.name].score == pytest.approx(reference(rows(x), rows(h), G, 3), rel=1e-3)


def scored(*, frozen: bool) -> tuple[dict[str, float], nn.Sequential]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    model[:4].requires_grad_(not frozen)
    x, labels = torch.randn(200, 7), torch.randint(0, 4, (200,))
    body = attach(model, x)
    found = score_sites(
        body, lambda: F.cross_entropy(model(x), labels), body.sites, size=2, generator=generator()
    )
    return {name: value.score for name, value in found.items()}, model


def test_a_frozen_host_scores_as_a_trained_one_and_stays_frozen():
    (trained, _), (frozen, model) = scored(frozen=False), scored(frozen=True)
    assert len(frozen) >= 2
    assert frozen == pytest.approx(trained)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    assert all(p.grad is None for p in model.parameters())


def test_scoring_leaves_the_model_as_it_was_and_the_same_stream_gives_the_same_answer():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    x = torch.randn(64, 6)
    body = attach(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def score() -> object:
        sites = [s for s in body.sites if s.kind == "bypass"]
        return score_sites(body, lambda: model(x).square().mean(), sites, size=2, generator=generator())

    first, second = score(), score()
    assert first == second
    assert first
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(m._esper_slot is None for m in model.modules() if isinstance(m, SeedLayer))


def test_a_planted_neck_scores_above_a_well_fed_layer():
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(16, 2),
        nn.ReLU(),
        nn.Linear(2, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    x = torch.randn(512, 16)
    labels = (x @ torch.randn(16, 4)).argmax(1)
    body = attach(model, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    scores = score_sites(
        body, lambda: F.cross_entropy(model(x), labels), [body.site(n) for n in ("bypass:0->2", "bypass:4->6")],
        size=4, generator=generator(),
    )  # fmt: skip
    neck, fed = scores["bypass:0->2"], scores["bypass:4->6"]
    assert neck.excess > 2 * max(fed.excess, 0)
    assert neck.p_value == pytest.approx(1 / 17)


def test_sites_that_no_gradient_reaches_have_no_score_and_prices_grow_with_rows():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(64, 6)
    body = attach(model, x)
    sites = [s for s in body.sites if s.kind == "bypass"]
    others = [s for s in body.sites if s.kind == "parallel"]
    unmoved = torch.ones((), requires_grad=True)
    assert score_sites(body, lambda: model(x).sum(), others, size=2, generator=generator()) == {}
    assert score_sites(body, lambda: unmoved * x.sum(), sites, size=2, generator=generator()) == {}
    low = estimate_flops(body, sites, 64, max_samples=32, num_permutations=4)
    high = estimate_flops(body, sites, 64, max_samples=64, num_permutations=16)
    assert 3 * body.flops * 64 < low < high
