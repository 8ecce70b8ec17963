"""Score bypass sites of a live model: one hooked forward and backward, then the arithmetic of expressivity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.body import Body
from esper.kasmina.expressivity import (
    RowPlan,
    SiteScore,
    bypass_patches,
    plan_rows,
    score_site,
    scoring_flops,
    unfold_patches,
)
from esper.kasmina.layer import observed, primary
from esper.kasmina.sites import Site
from esper.kasmina.trace import preserved

__all__ = ["SiteRows", "capture_rows", "estimate_flops", "score_sites"]

_POOLED = 4
"""Side of the grid to which an image is pooled before it is compared with a vector, as ``shortcut`` does."""


@dataclass
class _Capture:
    """Keeps one layer's input and output of one forward pass."""

    x: Any = None
    y: Any = None

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        self.x, self.y = x, primary(y)


class SiteRows(NamedTuple):
    """Aligned rows of one site, as :mod:`esper.kasmina.expressivity` names them."""

    A: Tensor
    B: Tensor
    G: Tensor
    plan: RowPlan


def capture_rows(
    body: Body, loss: Callable[[], Tensor], sites: Sequence[Site], *, max_samples: int = 1024
) -> dict[str, SiteRows]:
    """Take source, target input and output gradient of bypass sites in one forward and backward.

    Args:
        body: The attached host.
        loss: Runs the host on a batch and returns its mean loss; called once, in eval mode with gradients,
            so that neither dropout nor running statistics move.
        sites: Sites that are no bypass, or that no gradient reaches, are left out of the answer.
        max_samples: Cap on rows a site.
    """
    wanted = [site for site in sites if site.kind == "bypass"]
    captures = {name: _Capture() for site in wanted for name in (site.source, site.target)}
    model = body.model
    watched = [(model.get_submodule(name), capture) for name, capture in captures.items()]
    targets = [model.get_submodule(site.target) for site in wanted]
    with observed(watched), preserved(model), _trained(targets), torch.enable_grad():
        model.eval()
        value = loss()
        reached = {
            name: capture.y
            for name, capture in captures.items()
            if isinstance(capture.y, Tensor) and capture.y.requires_grad
        }
        if not reached:
            return {}
        grads = torch.autograd.grad(value, list(reached.values()), allow_unused=True)
    gradients = dict(zip(reached, grads, strict=True))
    found = {}
    for site in wanted:
        grad = gradients.get(site.target)
        rows = None if grad is None else _rows(body, site, captures, grad, max_samples)
        if rows is not None:
            found[site.name] = rows
    return found


def score_sites(
    body: Body,
    loss: Callable[[], Tensor],
    sites: Sequence[Site],
    *,
    size: int,
    generator: torch.Generator,
    max_samples: int = 1024,
    num_permutations: int = 16,
) -> dict[str, SiteScore]:
    """Score ``sites`` on the batch that ``loss`` runs.

    Args:
        body: The attached host.
        loss: As for :func:`capture_rows`.
        sites: Bypass sites; others, and those no gradient reaches, are left out of the answer.
        size: Units that would be added.
        generator: Source of the permutations.
        max_samples: Cap on rows a site.
        num_permutations: Size of the null.

    Returns:
        Site name -> score with its noise floor.
    """
    rows = capture_rows(body, loss, sites, max_samples=max_samples)
    return {
        name: score_site(
            found.A,
            found.B,
            found.G,
            size,
            num_permutations=num_permutations,
            generator=generator,
            rows_per_example=found.plan.rows_per_example,
            max_samples=max_samples,
        )
        for name, found in rows.items()
    }


def estimate_flops(
    body: Body, sites: Sequence[Site], num_samples: int, *, max_samples: int, num_permutations: int
) -> float:
    """FLOPs that :func:`score_sites` would cost on batches of ``num_samples``, before it is run."""
    total = 3.0 * body.flops * num_samples
    for site in sites:
        if site.kind == "bypass":
            weight = body.model.get_submodule(site.target)._parameters["weight"]
            assert weight is not None
            c, q = weight[0].numel(), site.target_units
            n, p = min(num_samples * site.positions, max_samples), _width(site.source_shape)
            total += scoring_flops(n, p, c, q, num_permutations=num_permutations)
    return total


@contextmanager
def _trained(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Have the outputs of frozen layers carry a gradient while the block runs: a seed there would be trained."""
    frozen = [
        p
        for layer in layers
        for p in layer.parameters(recurse=False)
        if p.is_floating_point() and not p.requires_grad
    ]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) < 3 else shape[0] * min(_POOLED, shape[1]) * min(_POOLED, shape[2])


def _samples_first(x: Tensor, samples: int | None) -> Tensor:
    return x if not samples else x.movedim(samples, 0)


def _rows(
    body: Body, site: Site, captures: dict[str, _Capture], grad: Tensor, max_samples: int
) -> SiteRows | None:
    """Aligned rows A, B, G of one site; None where source and target positions have no common grid."""
    source, target = body.model.get_submodule(site.source), body.model.get_submodule(site.target)
    x, own = captures[site.source].x, captures[site.target].x
    if not isinstance(x, Tensor) or not isinstance(own, Tensor):
        return None
    conv = isinstance(target, nn.Conv2d)
    x = _samples_first(x, site.source_samples)
    own, grad = _samples_first(own, site.target_samples), _samples_first(grad, site.target_samples)
    grid = tuple(grad.shape[2:] if conv else grad.shape[1:-1])
    plan = plan_rows(grad.shape[0], grid, max_samples)
    G = -grad.shape[0] * plan.rows(grad, channels_first=conv)
    if isinstance(target, nn.Conv2d):
        if not isinstance(source, nn.Conv2d):
            return None
        size = (int(own.shape[2]), int(own.shape[3]))
        A = bypass_patches(x, source, target, size, plan)
        return SiteRows(A, unfold_patches(own, target, plan), G, plan)
    B = plan.rows(own)
    if x.dim() == 4 and not grid:  # an image read by a vector layer
        side = min(_POOLED, x.shape[2]), min(_POOLED, x.shape[3])
        x = F.adaptive_avg_pool2d(x, side).flatten(1)
    if tuple(x.shape[1:-1]) != grid:
        return None
    return SiteRows(plan.rows(x), B, G, plan)
