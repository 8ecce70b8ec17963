"""Expressivity against an independent reference, its noise floor, and a bottleneck that it must find."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.expressivity import (
    SiteScore,
    bottleneck_fraction,
    bypass_patches,
    gradmax_score,
    plan_rows,
    score_site,
    scoring_flops,
    tiny_score,
    unfold_patches,
    whitened_expressivity,
)

Array = np.ndarray


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inverse_root(M: Array) -> Array:
    values, vectors = np.linalg.eigh(M)
    roots = np.array([v**-0.5 if v >= 1e-6 * values.max() and v > 0 else 0.0 for v in values])
    return vectors @ np.diag(roots) @ vectors.T


def reference(a: Tensor, b: Tensor, g: Tensor, k: int) -> dict[str, float]:
    """GROWTH.md, section 1, line by line: nothing shared, nothing shortened."""
    n = len(a)
    A = np.hstack([a.double().numpy(), np.ones((n, 1))])
    B = np.hstack([b.double().numpy(), np.ones((n, 1))])
    G = g.double().numpy()
    S, E, BB = A.T @ A / n, G.T @ G / n, B.T @ B / n
    ridge = 1e-6 * np.mean(np.diag(BB))
    residual = G - B @ np.linalg.inv(BB + ridge * np.eye(len(BB))) @ (B.T @ G / n)
    P = inverse_root(S) @ A.T @ residual / n

    def top(M: Array) -> float:
        return float((np.linalg.svd(M, compute_uv=False)[:k] ** 2).sum())

    return {
        "whitened": top(P @ inverse_root(E)),
        "tiny": top(P),
        "gradmax": top(A.T @ G / n),
        "bottleneck": float((residual**2).sum() / (G**2).sum()),
    }


def problem(n: int = 200, p: int = 12, c: int = 4, q: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """A site where the hidden layer misses part of what the gradient follows; G's columns sum to zero."""
    g = generator(seed)
    A = torch.randn(n, p, generator=g)
    B = (A @ torch.randn(p, c, generator=g)).relu()
    G = 0.3 * A @ torch.randn(p, q, generator=g) + torch.randn(n, q, generator=g)
    return A, B, G - G.mean(1, keepdim=True)


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("sizes", [(200, 12, 4, 6), (50, 60, 4, 6), (300, 5, 20, 30)])
def test_agrees_with_the_reference(sizes: tuple[int, int, int, int], k: int) -> None:
    A, B, G = problem(*sizes)
    expected = reference(A, B, G, k)
    values = {
        "whitened": whitened_expressivity(A, B, G, k),
        "tiny": tiny_score(A, B, G, k),
        "gradmax": gradmax_score(A, G, k),
        "bottleneck": bottleneck_fraction(B, G),
    }
    for name, value in values.items():
        assert value.dtype == torch.float64
        np.testing.assert_allclose(float(value), expected[name], rtol=1e-8, atol=1e-12, err_msg=name)
    score = score_site(A, B, G, k, num_permutations=2, generator=generator()).score
    np.testing.assert_allclose(score, expected["whitened"], rtol=1e-8)


@pytest.mark.parametrize("rows_per_example", [1, 5])
def test_floor_is_that_of_full_recomputation_on_permuted_rows(rows_per_example: int) -> None:
    A, B, G = problem()
    result = score_site(
        A, B, G, 3, num_permutations=5, generator=generator(7), rows_per_example=rows_per_example
    )
    again = generator(7)
    null = []
    for _ in range(5):
        order = torch.randperm(len(G) // rows_per_example, generator=again)
        permuted = G.reshape(-1, rows_per_example, G.shape[1])[order].reshape(G.shape)
        null.append(reference(A, B, permuted, 3)["whitened"])
    np.testing.assert_allclose(result.floor, np.mean(null), rtol=1e-8)
    np.testing.assert_allclose(result.quantile, np.quantile(null, 0.95), rtol=1e-8)
    np.testing.assert_allclose(result.z, (result.score - np.mean(null)) / np.std(null, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(result.excess, result.score - np.mean(null), rtol=1e-8)


def test_score_ignores_the_scale_of_the_loss_and_nearly_that_of_the_inputs() -> None:
    A, B, G = problem()
    expected = float(whitened_expressivity(A, B, G, 3))
    assert float(whitened_expressivity(A, B, -1e-9 * G, 3)) == pytest.approx(expected, rel=1e-5)
    assert float(whitened_expressivity(30 * A, 0.1 * B, G, 3)) == pytest.approx(expected, rel=1e-3)


def test_more_units_never_score_less() -> None:
    A, B, G = problem()
    scores = [float(whitened_expressivity(A, B, G, k)) for k in range(1, 8)]
    assert scores == sorted(scores)


def test_missing_capacity_clears_the_floor_and_noise_does_not() -> None:
    A, B, G = problem(n=400)
    real = score_site(A, B, G, 4, generator=generator())
    assert real.z > 5.0
    assert real.p_value == pytest.approx(1 / 17)
    shuffled = [
        score_site(A, B, G[torch.randperm(400, generator=generator(seed))], 4, generator=generator(seed)).z
        for seed in range(20)
    ]
    assert abs(float(np.mean(shuffled))) < 0.8
    assert max(shuffled) < real.z / 2


def test_floor_is_about_dimensions_over_samples() -> None:
    n, p, q = 1000, 20, 5
    g = generator()
    result = score_site(
        torch.randn(n, p, generator=g),
        torch.randn(n, 2, generator=g),
        torch.randn(n, q, generator=g),
        q,
        generator=g,
    )
    assert result.floor == pytest.approx(p * q / n, rel=0.15)
    assert result.score == pytest.approx(result.floor, rel=0.3)


def test_correlated_rows_need_their_examples_permuted_whole() -> None:
    """Rows that repeat within an example carry no more than the example: free permutation is fooled."""
    fooled, honest = [], []
    for seed in range(8):
        g = generator(seed)
        A, B, G = (torch.randn(40, d, generator=g).repeat_interleave(16, 0) for d in (10, 3, 5))
        fooled.append(score_site(A, B, G, 5, generator=g).z)
        honest.append(score_site(A, B, G, 5, generator=g, rows_per_example=16).z)
    assert min(fooled) > 5.0
    assert abs(float(np.mean(honest))) < 1.5


def test_parallel_site_has_nothing_linear_to_gain() -> None:
    A, _, G = problem()
    result = score_site(A, A, G, 4, generator=generator())
    assert result.score == pytest.approx(0.0, abs=1e-8)


def test_zero_gradient_and_a_single_example_say_nothing() -> None:
    A, B, G = problem()
    silent = score_site(A, B, torch.zeros_like(G), 3, generator=generator())
    assert (silent.score, silent.floor, silent.z, silent.p_value) == (0.0, 0.0, 0.0, 1.0)
    single = score_site(A, B, G, 3, generator=generator(), rows_per_example=len(A))
    assert single.z == 0.0
    assert single.p_value == 1.0
    assert single.excess == pytest.approx(0.0, abs=1e-12)
    assert float(bottleneck_fraction(B, torch.zeros_like(G))) == 0.0


def test_seeded_and_capped() -> None:
    A, B, G = problem(n=3000)
    first, second = (score_site(A, B, G, 3, generator=generator(3)) for _ in range(2))
    assert first == second
    thinned = score_site(A[::3], B[::3], G[::3], 3, generator=generator(3))
    assert first == thinned  # 1000 of 3000 rows
    assert torch.equal(whitened_expressivity(A, B, G, 3, max_samples=5000), whitened_expressivity(
        A, B, G, 3, max_samples=3000
    ))  # fmt: skip


def test_refuses_what_cannot_be_scored() -> None:
    A, B, G = problem()
    with pytest.raises(GrowthError, match=r"same n >= 2.*A \(199, 12\)"):
        score_site(A[1:], B, G, 3, generator=generator())
    with pytest.raises(GrowthError, match="NaN or inf in G"):
        score_site(A, B, G / 0.0, 3, generator=generator())
    with pytest.raises(GrowthError, match="k >= 1"):
        score_site(A, B, G, 0, generator=generator())
    with pytest.raises(GrowthError, match="200 rows of 7 an example"):
        score_site(A, B, G, 1, generator=generator(), rows_per_example=7)
    with pytest.raises(GrowthError, match="at least 2 permutations"):
        score_site(A, B, G, 1, num_permutations=1, generator=generator())


def test_flops_follow_the_documented_orders() -> None:
    base = scoring_flops(1000, 50, 50, 10)
    assert 1e6 < base < 1e9
    assert scoring_flops(2000, 50, 50, 10) < 2 * base
    assert scoring_flops(1000, 100, 50, 10) > base
    assert scoring_flops(1000, 50, 50, 10, num_permutations=8) > base
    A, B, G = problem()
    score = score_site(A, B, G, 3, num_permutations=4, generator=generator())
    assert score.flops == scoring_flops(200, 12, 4, 6, num_permutations=4)


def test_finds_the_starved_layer_of_a_trained_network() -> None:
    """MLPs with hidden widths 24-24-24, one of them cut to 3: the bypass over that layer scores highest."""
    for starved in range(3):
        scores = _scores_of_a_trained_host(starved)
        best = max(range(3), key=lambda at: scores[at].score)
        assert best == starved, [s.score for s in scores]
        assert scores[starved].z > 3.0
        assert scores[starved].p_value == pytest.approx(1 / 17)


def _scores_of_a_trained_host(starved: int) -> list[SiteScore]:
    torch.manual_seed(starved)
    widths = [24, 24, 24]
    widths[starved] = 3
    sizes = [16, *widths, 8]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    x = torch.randn(1024, 16)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        y = (8 * teacher(x)).argmax(1)
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=5e-3)

    def forward() -> tuple[list[Tensor], list[Tensor], Tensor]:
        inputs, outputs, h = [], [], x
        for i, layer in enumerate(layers):
            inputs.append(h)
            z = layer(h)
            outputs.append(z)
            h = z.relu() if i + 1 < len(layers) else z
        return inputs, outputs, F.cross_entropy(outputs[-1], y)

    for _ in range(150):
        optimizer.zero_grad()
        forward()[2].backward()
        optimizer.step()
    inputs, outputs, loss = forward()
    gradients = torch.autograd.grad(loss, outputs)
    return [
        score_site(inputs[at], inputs[at + 1], -1024 * gradients[at + 1], 8, generator=generator())
        for at in range(3)
    ]


def test_convolutional_site_from_patches() -> None:
    """conv1 has one channel where the teacher has six: its bypass clears the floor, permuted it does not."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    first, second = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
    x = torch.randn(64, 2, 8, 8)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-2)
    with torch.no_grad():
        wanted = teacher(x)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(second(first(x).relu()), wanted).backward()
        optimizer.step()
    hidden = first(x).relu()
    out = second(hidden)
    gradient = torch.autograd.grad(F.mse_loss(out, wanted), out)[0]
    plan = plan_rows(64, (8, 8), max_rows=1024)
    A = bypass_patches(x, first, second, (8, 8), plan)
    B = unfold_patches(hidden, second, plan)
    G = -64 * plan.rows(gradient, channels_first=True)
    assert A.shape == (plan.num_rows, 18)
    score = score_site(A, B, G, 4, generator=generator(), rows_per_example=plan.rows_per_example)
    assert score.z > 5.0
    permuted = G.reshape(64, -1, 4)[torch.randperm(64, generator=generator(1))].reshape(G.shape)
    null = score_site(A, B, permuted, 4, generator=generator(), rows_per_example=plan.rows_per_example)
    assert abs(null.z) < 3.0
