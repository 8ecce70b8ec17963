"""Autograd pieces that let a seed learn from the task loss without touching its host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["TrustRegionIsolate", "all_finite", "guard_gradient", "guarded_add", "isolate"]


class TrustRegionIsolate(torch.autograd.Function):
    """Return the host's value unchanged while the seed receives a gradient.

    Forward: ``y`` bit for bit (a copy, so that a following in-place activation stays legal).
    Backward: the host gets ``g = dL/dy`` as if the seed were absent. The seed output ``s`` gets
    ``g + s·‖g‖ / (r·‖y‖)``: the gradient of ``<g, s> + ‖g‖/(2 r ‖y‖)·‖s‖²``. Without the second
    term nothing would ever saturate an isolated seed, because ``g`` does not depend on ``s``
    (GROWTH.md §3.9); with it the seed is fitted to the steepest-descent step of relative length
    ``r`` that it can represent, as one round of functional gradient boosting is (Friedman 2001).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, s: Tensor, radius: float) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        y, s, ctx.radius = inputs
        ctx.save_for_backward(y, s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, s = ctx.saved_tensors
        limit = ctx.radius * torch.linalg.vector_norm(y.float())
        pull = torch.linalg.vector_norm(grad.float()) / limit.clamp_min(1e-12)
        return grad, grad.to(s.dtype) + s * pull.to(s.dtype), None


class _GuardGradient(torch.autograd.Function):
    """Identity forward; backward drops a gradient that holds any non-finite entry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.where(all_finite(grad), grad, grad.new_zeros(()))


def all_finite(x: Tensor) -> Tensor:
    """Return whether no entry of ``x`` is a NaN or an inf, as a 0-dimensional bool on its device.

    One pass over ``x``: a NaN or an inf among the terms never leaves a finite sum. (``isfinite(x).all()`` takes
    five on a CPU.) A sum of finite terms that overflows, above 1e38, counts as not finite: it is on its way there.

    Args:
        x: Any shape; halves are added up in float32.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    return torch.isfinite(x.detach().sum(dtype=wide))


def isolate(y: Tensor, s: Tensor, radius: float) -> Tensor:
    """Pass ``y`` through and hand its gradient to ``s`` as well; see :class:`TrustRegionIsolate`.

    Args:
        y: The host's value, any shape.
        s: The seed's contribution, same shape.
        radius: Length of the fitted step relative to ``‖y‖``; must be positive.

    Returns:
        A tensor with exactly the values of ``y``.
    """
    result: Tensor = TrustRegionIsolate.apply(y, s, radius)
    return result


def guard_gradient(x: Tensor) -> Tensor:
    """Return ``x`` such that a non-finite gradient through it becomes zero.

    Sits in front of a blending seed: a seed whose backward overflows cannot poison upstream layers.
    """
    result: Tensor = _GuardGradient.apply(x)
    return result


def guarded_add(y: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
    """Return ``y + alpha * s``, or ``y`` where any entry of ``s`` is not finite.

    Args:
        y: Host value, any shape.
        s: Seed contribution, same shape and dtype.
        alpha: 0-dimensional weight on the same device.
    """
    contribution = alpha * s
    return y + torch.where(all_finite(s), contribution, contribution.new_zeros(()))
