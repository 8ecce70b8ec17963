"""``norm``: a learned re-normalisation of a layer's output, added to it.

Legend: B batch, C channels or units, g groups.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.sites import BuildContext

__all__ = ["GroupedLayerNorm", "norm"]

_EPS = 1e-5


class GroupedLayerNorm(nn.Module):
    """``γ ⊙ normalise(y) + β`` over each of ``groups`` groups of the last dimension; γ = β = 0 at first.

    With one group this is layer normalisation. It keeps no running statistics and mixes no positions,
    so it is the same in training and evaluation and leaks nothing between tokens.

    Shape:
        y: (*, C); output the same.
    """

    def __init__(self, units: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(units))
        self.bias = nn.Parameter(torch.zeros(units))

    def forward(self, y: Tensor) -> Tensor:
        """Return the contribution."""
        parts = y.unflatten(-1, (self.groups, -1))
        normalised = F.layer_norm(parts, parts.shape[-1:], eps=_EPS).flatten(-2)
        return normalised * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, groups={self.groups}"


def _values_of_a_unit(context: BuildContext) -> int:
    """Entries of one unit that a group normalises together: the pixels of a channel, else one."""
    return prod(context.site.target_shape[1:]) if context.site.image else 1


def _reason(context: BuildContext) -> str | None:
    site = context.site
    if site.functional:
        return "its weight is used without calling it, so it has no output of its own; use 'lowrank'"
    if site.target_units * _values_of_a_unit(context) < 2:
        return "an output of one value has no mean and spread to normalise by"
    return None


def _num_groups(context: BuildContext, size: int) -> int:
    """The largest divisor of the width, at most ``size``, that leaves each group two values or more."""
    units, values = context.site.target_units, _values_of_a_unit(context)
    return next(g for g in range(min(size, units), 0, -1) if units % g == 0 and units // g * values >= 2)


@blueprint(
    "norm",
    kinds=("parallel",),
    reads="output",
    default_size=lambda context: 8 if context.site.image else 1,
    accepts=_reason,
)
def norm(context: BuildContext, size: int) -> nn.Module:
    """Group normalisation of a feature map, layer normalisation of vectors; ``size`` is the number of groups.

    The number is lowered to a divisor of the width.
    """
    units, groups = context.site.target_units, _num_groups(context, size)
    if context.site.image:
        layer = nn.GroupNorm(groups, units, eps=_EPS)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer
    return GroupedLayerNorm(units, groups)
