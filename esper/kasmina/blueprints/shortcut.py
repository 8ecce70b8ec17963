"""``shortcut``: a linear map along a long bypass, from the host's input or an early layer to an output.

Legend: p source width, q target width, r rank, C source channels, Q target channels, H, W height and
width, T tokens.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor, nn

from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.blueprints.units import he, zero
from esper.kasmina.sites import BuildContext

__all__ = ["MeanOverTokens", "shortcut"]

_POOLED_SIDE = 4
"""Side of the grid that a feature map is averaged to in front of a dense output."""


class MeanOverTokens(nn.Module):
    """Average all positions of a sequence: (B, T, p) to (B, p), or (T, B, p) where samples come second.

    Args:
        samples: Dimension that counts samples: 0 or 1.
    """

    def __init__(self, samples: int = 0) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over the dimension that counts tokens."""
        return x.mean(dim=1 - self.samples)

    def extra_repr(self) -> str:
        return f"samples={self.samples}"


def _from_image(context: BuildContext) -> bool:
    # A Linear's input of three dimensions is a grid of tokens, whose units stand last.
    return len(context.site.source_shape) == 3 and not isinstance(
        context.source_layer, (nn.Linear, nn.LayerNorm)
    )


_UNKNOWN = "it is not known which dimension of its source counts samples, so tokens cannot be averaged"
_APART = (
    "its source has samples in dimension {site.source_samples}, its target in dimension {site.target_samples}, "
    "so their positions do not match"
)


def _reason(context: BuildContext) -> str | None:
    site = context.site
    source, target = site.source_shape, site.target_shape
    if not site.long:
        return "it is for long bypasses to an output layer; next to a layer use 'widen' or 'conv_widen'"
    if isinstance(context.target_layer, nn.Conv2d):
        return (
            None if _from_image(context) else f"a feature map cannot be made from a source of shape {source}"
        )
    if not isinstance(context.target_layer, nn.Linear):
        kind = type(context.target_layer).__name__
        return f"target {site.target!r} should be an nn.Linear or nn.Conv2d, but is {kind}"
    if _from_image(context):
        return (
            None
            if len(target) == 1
            else f"an image cannot be laid out over the target's positions {target[:-1]}"
        )
    if len(source) == 2 and len(target) == 1:
        return None if site.source_samples is not None else _UNKNOWN
    if source[:-1] == target[:-1]:
        return None if site.source_samples == site.target_samples else _APART.format(site=site)
    return f"positions {source[:-1]} of the source do not match {target[:-1]} of the target"


def _widths(context: BuildContext) -> tuple[int, int]:
    """Inputs and outputs of the linear map itself."""
    site = context.site
    if not _from_image(context):
        return site.source_shape[-1], site.target_units
    channels, height, width = site.source_shape
    if isinstance(context.target_layer, nn.Conv2d):
        return channels, site.target_units
    return channels * min(_POOLED_SIDE, height) * min(_POOLED_SIDE, width), site.target_units


def _full_rank(context: BuildContext) -> int:
    return min(_widths(context))


def _resize(context: BuildContext) -> nn.Module:
    """Average a feature map to the height and width of the target's."""
    size, wanted = context.site.source_shape[1:], context.site.target_shape[1:]
    strides = [max(1, round(a / b)) for a, b in zip(size, wanted, strict=True)]
    if [ceil(a / s) for a, s in zip(size, strides, strict=True)] != list(wanted):
        return nn.AdaptiveAvgPool2d((wanted[0], wanted[1]))
    if strides == [1, 1]:
        return nn.Identity()
    # Cells of a fixed stride rather than a fixed grid: the host may be given images of other sizes.
    return nn.AvgPool2d((strides[0], strides[1]), ceil_mode=True)


@blueprint("shortcut", kinds=("bypass",), default_size=_full_rank, accepts=_reason)
def shortcut(context: BuildContext, size: int) -> nn.Sequential:
    """A zero linear map from the source to the target's output, of rank at most ``size``.

    A feature map is averaged to the target's grid (convolutional target) or to at most 4 x 4 cells
    (dense target); a sequence in front of a vector is averaged over its tokens. From full rank on the
    map is a single matrix, zero at the start; below it has two factors, of which the second is zero.
    """
    dense = isinstance(context.target_layer, nn.Linear)
    inputs, outputs = _widths(context)
    steps: list[nn.Module] = []
    if _from_image(context):
        _, height, width = context.site.source_shape
        cells = (min(_POOLED_SIDE, height), min(_POOLED_SIDE, width))
        steps += [nn.AdaptiveAvgPool2d(cells), nn.Flatten()] if dense else [_resize(context)]
    elif len(context.site.source_shape) > len(context.site.target_shape):
        steps.append(MeanOverTokens(context.site.source_samples or 0))
    widths = (inputs, outputs) if size >= min(inputs, outputs) else (inputs, size, outputs)
    for index in range(len(widths) - 1):
        layer = _pointwise(dense, widths[index], widths[index + 1])
        steps.append(zero(layer) if index == len(widths) - 2 else he(layer))
    return nn.Sequential(*steps)


def _pointwise(dense: bool, inputs: int, outputs: int) -> nn.Linear | nn.Conv2d:
    return nn.Linear(inputs, outputs, bias=False) if dense else nn.Conv2d(inputs, outputs, 1, bias=False)
