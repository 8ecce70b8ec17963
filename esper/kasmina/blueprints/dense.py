"""Blueprints at ``nn.Linear`` layers and their like: ``widen``, ``bottleneck`` and ``lowrank``.

Legend: p inputs, q outputs, k hidden units, r rank; x is [*, p] and the contribution [*, q].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.activations import is_elementwise
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.blueprints.units import HiddenUnits, between_layers, he, zero
from esper.kasmina.linear_like import features
from esper.kasmina.sites import BuildContext

__all__ = ["LowRank", "bottleneck", "init_widen_closed_form", "lowrank", "widen"]


def not_between_linears(context: BuildContext) -> str | None:
    """Why new units between the source and the target layer would not be units of the host's kind."""
    site = context.site
    for role, name, layer in (
        ("source", site.source, context.source_layer),
        ("target", site.target, context.target_layer),
    ):
        if not isinstance(layer, nn.Linear):
            return f"{role} {name!r} should be an nn.Linear, but is {type(layer).__name__}"
    strange = [op for op in site.ops if not is_elementwise(op)]
    if strange:
        return (
            f"between {site.source!r} and {site.target!r} only element-wise operations may lie, "
            f"but there is {', '.join(strange)}"
        )
    if site.source_shape[:-1] != site.target_shape[:-1]:
        return (
            f"the source's positions {site.source_shape[:-1]} are not the target's {site.target_shape[:-1]}"
        )
    if site.source_samples != site.target_samples:
        return (
            f"the source has samples in dimension {site.source_samples}, the target in {site.target_samples}, so their "
            "positions do not match"
        )
    return None


def not_parallel_to_linear(context: BuildContext) -> str | None:
    """Why a branch from the layer's input to its output cannot run next to it."""
    if context.site.functional:
        return "its weight is used without calling it, so only the weight can be changed; use 'lowrank'"
    return _no_linear(context)


def _no_linear(context: BuildContext) -> str | None:
    layer = context.target_layer
    if features(layer) is None:
        return f"target {context.site.target!r} should be an nn.Linear, but is {type(layer).__name__}"
    return None


def _features(layer: nn.Module) -> tuple[int, int]:
    found = features(layer)
    assert found is not None
    return found


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer


def _widen_size(context: BuildContext) -> int:
    return max(16, _linear(context.source_layer).out_features // 2)


def _bottleneck_size(context: BuildContext) -> int:
    return max(8, min(_features(context.target_layer)) // 4)


def _rank(context: BuildContext) -> int:
    return min(8, *_features(context.target_layer))


@blueprint("widen", kinds=("bypass",), default_size=_widen_size, accepts=not_between_linears)
def widen(context: BuildContext, size: int) -> HiddenUnits:
    """``size`` further hidden units between two linear layers: random fan-in, zero fan-out.

    A norm between the two (``site.through``) is the host units' own: the new ones go without. Units of a
    host whose layers have no bias have none either, so that its class can hold them.
    """
    source, target = _linear(context.source_layer), _linear(context.target_layer)
    bias = source.bias is not None or bool(context.site.through)
    return HiddenUnits(
        he(nn.Linear(source.in_features, size, bias=bias)),
        between_layers(context.site.ops),
        zero(nn.Linear(size, target.out_features, bias=False)),
    )


@torch.no_grad()
def init_widen_closed_form(branch: HiddenUnits, fan_in_weight: Tensor, fan_in_bias: Tensor) -> None:
    """Give the units of a ``widen`` or ``conv_widen`` branch a computed fan-in; the fan-out becomes zero.

    See :func:`esper.kasmina.closed_form.closed_form_start`, which computes it in float64.

    Args:
        branch: As built by the blueprint.
        fan_in_weight: [k, p]; for a convolution [k, C * kh * kw] or [k, C, kh, kw].
        fan_in_bias: [k]; left out where the units have no bias.

    Raises:
        GrowthError: A shape does not fit, or a value is not finite. Nothing was changed.
    """
    layer = branch.fan_in
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    flat = (layer.weight.shape[0], layer.weight[0].numel())
    if (
        tuple(fan_in_weight.shape) not in (flat, tuple(layer.weight.shape))
        or tuple(fan_in_bias.shape) != flat[:1]
    ):
        raise GrowthError(
            f"closed-form start: expected a fan-in of shape {flat} and a bias of {flat[:1]}, got "
            f"{tuple(fan_in_weight.shape)} and {tuple(fan_in_bias.shape)}; compute it for this site and size"
        )
    if not (torch.isfinite(fan_in_weight).all() and torch.isfinite(fan_in_bias).all()):
        raise GrowthError(
            "closed-form start: the fan-in holds a NaN or an inf; compute it from finite samples"
        )
    layer.weight.copy_(fan_in_weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(fan_in_bias)
    assert isinstance(branch.fan_out, (nn.Linear, nn.Conv2d))
    zero(branch.fan_out)


@blueprint("bottleneck", kinds=("parallel",), default_size=_bottleneck_size, accepts=not_parallel_to_linear)
def bottleneck(context: BuildContext, size: int) -> HiddenUnits:
    """A non-linear branch of ``size`` units from a layer's input to its output (a parallel adapter).

    Source: He et al. 2022, arXiv 2110.04366, "parallel adapter".
    """
    inputs, outputs = _features(context.target_layer)
    return HiddenUnits(
        he(nn.Linear(inputs, size)),
        nn.GELU(),
        zero(nn.Linear(size, outputs, bias=False)),
    )


class LowRank(nn.Module):
    """``B A x``: adds a matrix of rank r to a layer's weight W [q, p].

    Source: Hu et al. 2021, arXiv 2106.09685. Deviation: no extra scale; α of the seed is the scale.

    Shape:
        x: (*, p); output: (*, q). ``A.weight``: (r, p); ``B.weight``: (q, r), zero at the start.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = he(nn.Linear(in_features, rank, bias=False))
        self.B = zero(nn.Linear(rank, out_features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the contribution for inputs ``x``."""
        result: Tensor = self.B(self.A(x))
        return result

    def delta_weight(self) -> Tensor:
        """What to add to the host's weight to the same effect, [q, p]."""
        return self.B.weight @ self.A.weight


@blueprint("lowrank", kinds=("parallel",), default_size=_rank, accepts=_no_linear)
def lowrank(context: BuildContext, size: int) -> LowRank:
    """W + BA of rank ``size``; the only blueprint for a weight that is used without calling its layer."""
    return LowRank(*_features(context.target_layer), size)
