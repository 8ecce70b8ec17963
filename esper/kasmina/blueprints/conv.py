"""Blueprints at ``nn.Conv2d`` layers: ``conv_widen`` and ``depthwise``.

Legend: C channels, H height, W width, k new channels, Q the target's output channels.
"""

from __future__ import annotations

import torch
from torch import nn

from esper.kasmina.activations import is_elementwise, is_pool
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.blueprints.units import HiddenUnits, between_layers, he, zero
from esper.kasmina.sites import BuildContext

__all__ = ["conv_widen", "depthwise"]


def _conv(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return layer


def _like(
    layer: nn.Conv2d, channels_in: int, channels_out: int, *, groups: int = 1, bias: bool = True
) -> nn.Conv2d:
    """A convolution with the geometry of ``layer`` and other channels."""
    return nn.Conv2d(
        channels_in,
        channels_out,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=layer.padding_mode,
    )


def _not_between_convs(context: BuildContext) -> str | None:
    site = context.site
    for role, name, layer in (
        ("source", site.source, context.source_layer),
        ("target", site.target, context.target_layer),
    ):
        if not isinstance(layer, nn.Conv2d):
            return f"{role} {name!r} should be an nn.Conv2d, but is {type(layer).__name__}"
    strange = [op for op in site.ops if not (is_elementwise(op) or is_pool(op))]
    if strange:
        return (
            f"between {site.source!r} and {site.target!r} only element-wise operations and pools may lie, "
            f"but there is {', '.join(strange)}"
        )
    with torch.device("meta"), torch.no_grad():
        shape = tuple(_channels(context, 1)(torch.empty((1, *site.source_shape))).shape[1:])
    if shape != site.target_shape:
        return f"both layers' geometry gives an output of {shape}, but the target's is {site.target_shape}"
    return None


def _channels(context: BuildContext, size: int) -> HiddenUnits:
    source, target = _conv(context.source_layer), _conv(context.target_layer)
    return HiddenUnits(
        he(_like(source, source.in_channels, size)),
        between_layers(context.site.ops),
        zero(_like(target, size, target.out_channels, bias=False)),
    )


def _widen_size(context: BuildContext) -> int:
    return max(16, _conv(context.source_layer).out_channels // 2)


@blueprint("conv_widen", kinds=("bypass",), default_size=_widen_size, accepts=_not_between_convs)
def conv_widen(context: BuildContext, size: int) -> HiddenUnits:
    """``size`` further channels between two convolutions: random fan-in, zero fan-out, no groups.

    Strides, padding and dilation are the host layers' own, and so are activation and pooling between.
    """
    return _channels(context, size)


def _no_conv(context: BuildContext) -> str | None:
    layer = context.target_layer
    if not isinstance(layer, nn.Conv2d):
        return f"target {context.site.target!r} should be an nn.Conv2d, but is {type(layer).__name__}"
    return None


@blueprint("depthwise", kinds=("parallel",), default_size=1, accepts=_no_conv)
def depthwise(context: BuildContext, size: int) -> HiddenUnits:
    """A depthwise convolution with the layer's kernel, ``size`` maps a channel, then a zero pointwise one.

    A ReLU between the two (as in MobileNet, arXiv 1704.04861): without it the branch would be a
    convolution that the host's own kernel can already express.
    """
    layer = _conv(context.target_layer)
    maps = layer.in_channels * size
    return HiddenUnits(
        he(_like(layer, layer.in_channels, maps, groups=layer.in_channels)),
        nn.ReLU(),
        zero(nn.Conv2d(maps, layer.out_channels, 1, bias=False)),
    )
