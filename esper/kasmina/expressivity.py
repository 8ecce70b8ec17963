"""Where capacity is missing: whitened expressivity of a site, against its permutation noise floor.

To add k hidden units that read a source tensor and write to a target layer's output, with n samples (rows):

* A ``[n, p]`` the source tensor, B ``[n, c]`` what the target layer already reads, a column of ones appended
  to both here; G ``[n, q]`` = -n dL/dz at the target's output, for a mean loss L;
* S = A'A/n, E = G'G/n; G_perp = G - B (B'B/n + lambda I)^-1 B'G/n, lambda = 1e-6 x mean diagonal;
* P = S^-1/2 A'G_perp/n (TINY, Verbockhaven et al. 2024); Q = P E^-1/2; score = sum of the k largest
  squared singular values of Q. Inverse square roots drop eigenvalues below 1e-6 of the largest.

All in float64 on at most ``max_samples`` rows. The score does not depend on the scale of G; on those of A and
B only through lambda and the cut, against the column of ones.

**Noise floor.** Estimated from n rows, the score of a site where nothing is missing is not 0 but about
(p + 1) q / n. Permuting the rows of G against A and B gives the scores of that null. Because
A'G_perp = (A - B (B'B/n + lambda I)^-1 B'A/n)'G, residualising A once and permuting the whitened G afterwards
gives exactly the score that a full recomputation on permuted rows would: the eigendecompositions are shared.
Rows of one example (positions of an image or a sequence) are correlated; their block is permuted whole
(``rows_per_example``), else the floor would come out too low.

A *parallel* site has A = B: what a linear map of A can add, the layer has already, so its score is close
to 0 by construction. The statistic says nothing about purely non-linear additions.

Source: ``design/GROWTH.md`` sections 1 and 5; TINY, arXiv 2405.19816; GradMax, arXiv 2201.05125.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.errors import GrowthError
from esper.kasmina.sampling import RowPlan, bypass_patches, plan_rows, unfold_patches

__all__ = [
    "RowPlan",
    "SiteScore",
    "bottleneck_fraction",
    "bypass_patches",
    "gradmax_score",
    "inverse_root",
    "plan_rows",
    "prepare",
    "residual_gradient",
    "score_site",
    "scoring_flops",
    "tiny_score",
    "unfold_patches",
    "whitened_expressivity",
    "with_ones",
]

EIGENVALUE_CUT = 1e-6
"""Eigenvalues below this share of the largest are dropped: softmax makes E rank-deficient."""
RIDGE = 1e-6
"""lambda of the residual, as a share of the mean diagonal of B'B/n."""


@dataclass(frozen=True, slots=True)
class SiteScore:
    """Score of one site and the null that it was tested against.

    Attributes:
        score: whitened expressivity, >= 0.
        floor: mean of the permuted scores.
        quantile: their 95 % quantile (interpolated; close to the largest with few permutations).
        z: (score - floor) / standard deviation of the permuted scores; 0 where they do not vary.
        p_value: (1 + number of permuted scores >= score) / (1 + permutations).
        excess: score - floor; may be negative.
        flops: floating-point operations this score cost (:func:`scoring_flops`).
    """

    score: float
    floor: float
    quantile: float
    z: float
    p_value: float
    excess: float
    flops: float


def whitened_expressivity(A: Tensor, B: Tensor, G: Tensor, k: int, *, max_samples: int = 1024) -> Tensor:
    """Return sum_{j<=k} sigma_j(Q)^2 as a float64 scalar; shapes as in the module's legend."""
    A, B, G = prepare(A, B, G, k=k, max_samples=max_samples)
    source, gradient = _whitened_factors(A, B, G)
    return _top(source.T @ gradient / A.shape[0], k)


def score_site(
    A: Tensor,
    B: Tensor,
    G: Tensor,
    k: int,
    *,
    num_permutations: int = 16,
    generator: torch.Generator,
    rows_per_example: int = 1,
    max_samples: int = 1024,
) -> SiteScore:
    """Score a site and test it against permuted gradients.

    Args:
        A: source rows ``[n, p]`` (the input of the source layer; patches for a convolution).
        B: rows of the target layer's own input ``[n, c]``.
        G: rows of -n dL/dz at the target's output ``[n, q]``; any constant factor cancels.
        k: units to add, that is singular values to sum.
        num_permutations: permuted scores, at least 2.
        generator: source of the permutations; on the CPU, so that a run is the same on every device.
        rows_per_example: consecutive rows that belong to one example (:attr:`RowPlan.rows_per_example`).
            With a single example there is nothing to permute: floor = score, z = 0, p = 1.
        max_samples: cap on rows; whole examples are left out evenly beyond it.

    Raises:
        GrowthError: shapes disagree, values are not finite, or a count is out of range.
    """
    if num_permutations < 2:
        raise GrowthError(f"expected at least 2 permutations for a noise floor, got {num_permutations}")
    A, B, G = prepare(A, B, G, k=k, rows_per_example=rows_per_example, max_samples=max_samples)
    n, q = G.shape
    source, gradient = _whitened_factors(A, B, G)
    blocks = gradient.reshape(n // rows_per_example, rows_per_example * gradient.shape[1])
    products = [source.T @ gradient]
    for _ in range(num_permutations):
        order = torch.randperm(blocks.shape[0], generator=generator, device=generator.device)
        permuted = blocks[order.to(blocks.device)].reshape(n, gradient.shape[1])
        products.append(source.T @ permuted)
    scores = _top(torch.stack(products) / n, k)
    score, null = scores[0], scores[1:]
    # Below rounding the null does not vary: a zero gradient, a parallel site, a single example.
    spread = null.std()
    z = torch.where(spread > 1e-12 * (score + null.mean()), (score - null.mean()) / spread, 0.0)
    exceeding = (null >= score * (1.0 - 1e-12)).sum()
    figures = torch.stack([score, null.mean(), null.quantile(0.95), z.nan_to_num(0.0), exceeding]).tolist()
    return SiteScore(
        score=figures[0],
        floor=figures[1],
        quantile=figures[2],
        z=figures[3],
        p_value=(1.0 + figures[4]) / (1.0 + num_permutations),
        excess=figures[0] - figures[1],
        flops=scoring_flops(n, A.shape[1] - 1, B.shape[1] - 1, q, num_permutations=num_permutations),
    )


def tiny_score(A: Tensor, B: Tensor, G: Tensor, k: int, *, max_samples: int = 1024) -> Tensor:
    """Return sum_{j<=k} sigma_j(P)^2: the largest first-order loss decrease that k new units can give."""
    A, B, G = prepare(A, B, G, k=k, max_samples=max_samples)
    n = A.shape[0]
    return _top(inverse_root(A.T @ A / n).T @ (A.T @ residual_gradient(B, G)) / n, k)


def gradmax_score(A: Tensor, G: Tensor, k: int, *, max_samples: int = 1024) -> Tensor:
    """Return sum_{j<=k} sigma_j(A'G/n)^2: the largest gradient norm of the fan-out of k new units."""
    A, _, G = prepare(A, A, G, k=k, max_samples=max_samples)
    return _top(A.T @ G / A.shape[0], k)


def bottleneck_fraction(B: Tensor, G: Tensor, *, max_samples: int = 1024) -> Tensor:
    """Return |G_perp|^2 / |G|^2 in [0, 1]: the share of the gradient that the layer's input cannot follow."""
    _, B, G = prepare(B, B, G, k=1, max_samples=max_samples)
    whole = G.square().sum()
    share = residual_gradient(B, G).square().sum() / whole.clamp(min=1e-300)
    return torch.where(whole > 0, share.clamp(0.0, 1.0), 0.0)


def residual_gradient(B: Tensor, G: Tensor) -> Tensor:
    """Return G - B (B'B/n + lambda I)^-1 B'G/n for a prepared B ``[n, c+1]`` (float64, with ones)."""
    n = B.shape[0]
    moments = B.T @ B / n
    ridge = RIDGE * moments.diagonal().mean()
    factor = torch.linalg.cholesky(moments + ridge * torch.eye(B.shape[1], dtype=B.dtype, device=B.device))
    return G - B @ torch.cholesky_solve(B.T @ G / n, factor)


def inverse_root(M: Tensor) -> Tensor:
    """Return V L^-1/2 ``[p, r]`` of a symmetric M = V L V', without eigenvalues below 1e-6 of the largest.

    It differs from the symmetric M^-1/2 by a rotation from the right, which no singular value notices.
    A zero matrix has no eigenvalue worth keeping: r = 0.
    """
    values, vectors = torch.linalg.eigh(M)
    keep = (values >= EIGENVALUE_CUT * values[-1]) & (values > 0)
    return vectors[:, keep] * values[keep].rsqrt()


def with_ones(x: Tensor) -> Tensor:
    """Append the column of ones that stands for a bias: ``[n, p]`` -> ``[n, p + 1]``."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def prepare(
    A: Tensor, B: Tensor, G: Tensor, *, k: int, rows_per_example: int = 1, max_samples: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Validate, thin out to ``max_samples`` rows, convert to float64 and append ones to A and B.

    Raises:
        GrowthError: shapes disagree, values are not finite, or a count is out of range.
    """
    shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}, G {tuple(G.shape)}"
    if not (A.ndim == B.ndim == G.ndim == 2 and A.shape[0] == B.shape[0] == G.shape[0] >= 2):
        raise GrowthError(
            f"expected A [n, p], B [n, c] and G [n, q] with the same n >= 2 for expressivity, got {shapes}; "
            "pick the rows of all three with one RowPlan"
        )
    if k < 1 or max_samples < 2 or rows_per_example < 1 or A.shape[0] % rows_per_example:
        raise GrowthError(
            f"expected k >= 1, max_samples >= 2 and rows in whole examples, got k={k}, "
            f"max_samples={max_samples}, {A.shape[0]} rows of {rows_per_example} an example"
        )
    num_examples = A.shape[0] // rows_per_example
    step = math.ceil(num_examples / max(1, max_samples // rows_per_example))
    prepared = []
    for name, matrix in zip("ABG", (A, B, G), strict=True):
        matrix = matrix.detach()
        if step > 1:
            matrix = matrix.reshape(num_examples, rows_per_example, -1)[::step].flatten(0, 1)
        # MPS has neither float64 nor eigh.
        matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
        if not bool(matrix.isfinite().all()):
            raise GrowthError(
                f"expected finite rows for expressivity, got NaN or inf in {name} ({shapes}); score a step "
                "whose loss is finite"
            )
        prepared.append(matrix)
    return with_ones(prepared[0]), with_ones(prepared[1]), prepared[2]


def scoring_flops(n: int, p: int, c: int, q: int, *, num_permutations: int = 0) -> float:
    """Floating-point operations of scoring one site: O(n(p^2 + pc + c^2 + pq + q^2) + p^3 + c^3 + q^3).

    Counts a multiply-add as 2, ``eigh`` of order m as 9 m^3, Cholesky as m^3 / 3; the forward and backward
    pass that yields A, B and G is the caller's to charge.
    """
    p, c = p + 1, c + 1
    moments = 2 * n * (p * p + c * c + q * q)
    residual = c**3 / 3 + 2 * c * c * p + 4 * n * c * p
    whitening = 9 * (p**3 + q**3) + 2 * n * (p * p + q * q)
    products = (1 + num_permutations) * (2 * n * p * q + 2 * p * q * min(p, q) + 9 * min(p, q) ** 3)
    return float(moments + residual + whitening + products)


def _whitened_factors(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A - B(...)^-1 B'A/n) S^-1/2 and G E^-1/2; Q is the one transposed times the other, over n."""
    n = A.shape[0]
    source = residual_gradient(B, A) @ inverse_root(A.T @ A / n)
    return source, G @ inverse_root(G.T @ G / n)


def _top(Q: Tensor, k: int) -> Tensor:
    """Sum of the k largest squared singular values of ``[*, a, b]``; all of them need no decomposition."""
    if k >= min(Q.shape[-2:]):
        return Q.square().sum((-2, -1))
    gram = Q @ Q.mT if Q.shape[-2] < Q.shape[-1] else Q.mT @ Q
    return torch.linalg.eigvalsh(gram)[..., -k:].clamp(min=0.0).sum(-1)
