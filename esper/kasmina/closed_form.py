"""Closed-form start of new units (TINY): the fan-in that the residual gradient asks for.

With the notation of :mod:`esper.kasmina.expressivity` and P = S^-1/2 A'G_perp/n = U D V', TINY starts the
units at fan-in D^1/2 U' S^-1/2 and fan-out V D^1/2, whose product is the linear map that decreases the
loss fastest per unit of output change.

**Normalisation** (ours): every fan-in row is scaled to the mean squared pre-activation that a He row would
have on the same data, 2/p x mean |a|^2, and the fan-out inversely, which keeps the product. So learning
rates that suit a random start suit this one.

A function-preserving start needs a zero output: take fan-in and bias from here and set the fan-out to zero;
its first gradient then points along V. Keeping the fan-out as well takes the step at once and changes
the function.

**Deviation from the paper**: P has rank r <= q, often below the number of units. Rows r+1..2r are the
negatives of rows 1..r, since under ReLU the pair w, -w passes the whole linear map and w alone half of it;
rows beyond 2r are He's. Measured before (GROWTH.md, section 5): over a whole run no better than He.

Source: Verbockhaven et al. 2024, arXiv 2405.19816, theorem 3.1 and its linear approximation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.expressivity import inverse_root, prepare, residual_gradient

__all__ = ["ClosedFormStart", "closed_form_start"]


@dataclass(frozen=True, slots=True)
class ClosedFormStart:
    """Weights of k new units, float64.

    Attributes:
        weight_in: ``[k, p]``; for a convolution's patches view it as ``[k, C, kh, kw]``.
        bias_in: ``[k]``.
        weight_out: ``[q, k]``; for a convolution the centre tap. Zero for He rows.
        singular_values: ``[k]``, sigma_j(P) of each row, 0 for He rows.
    """

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    singular_values: Tensor


def closed_form_start(
    A: Tensor, B: Tensor, G: Tensor, k: int, *, generator: torch.Generator, max_samples: int = 1024
) -> ClosedFormStart:
    """Return TINY's start for ``k`` units.

    Args:
        A: source rows ``[n, p]``.
        B: rows of the target layer's own input ``[n, c]``.
        G: rows of -n dL/dz at the target's output ``[n, q]``.
        k: number of units.
        generator: source of the He rows that fill up beyond twice the rank of P.
        max_samples: cap on rows.

    Raises:
        GrowthError: shapes disagree, values are not finite, or ``k`` < 1.
    """
    A, B, G = prepare(A, B, G, k=k, max_samples=max_samples)
    n, p = A.shape[0], A.shape[1] - 1
    whitener = inverse_root(A.T @ A / n)
    U, sigma, Vh = torch.linalg.svd(whitener.T @ (A.T @ residual_gradient(B, G)) / n, full_matrices=False)
    rank = int((sigma > 1e-6 * sigma[:1].clamp(min=1e-300)).sum()) if sigma.numel() else 0
    # U' times the transposed whitener is U'S^-1/2 in the coordinates of A: directions of unit second moment.
    directions = (whitener @ U[:, :rank]).T
    he_moment = 2.0 * A[:, :p].square().sum() / (n * p)
    scale = torch.where(he_moment > 0, he_moment, 1.0).sqrt()
    taken = min(k, rank)
    mirrored = min(k - taken, rank)
    rows = torch.cat([directions[:taken], -directions[:mirrored]]) * scale
    columns = Vh[:rank].T * (sigma[:rank] / scale)
    fan_out = torch.cat([columns[:, :taken], -columns[:, :mirrored]], dim=1)
    filled = k - taken - mirrored
    random = torch.randn(filled, p, generator=generator, device=generator.device, dtype=torch.float64)
    return ClosedFormStart(
        weight_in=torch.cat([rows[:, :p], random.to(A.device) * math.sqrt(2.0 / p)]),
        bias_in=torch.cat([rows[:, p], A.new_zeros(filled)]),
        weight_out=torch.cat([fan_out, A.new_zeros(G.shape[1], filled)], dim=1),
        singular_values=torch.cat([sigma[:taken], sigma[:mirrored], A.new_zeros(filled)]),
    )
