"""New hidden units and how their weights start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from esper.kasmina.activations import activation

__all__ = ["HiddenUnits", "between_layers", "he", "zero"]

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


class HiddenUnits(nn.Module):
    """``fan_out(between(fan_in(x)))``: further units next to the host's own.

    Args:
        fan_in: Linear or Conv2d from the source to the units.
        between: What the host does between the two layers.
        fan_out: Linear or Conv2d, zero at the start, from the units to the target's outputs.
    """

    def __init__(self, fan_in: nn.Module, between: nn.Module, fan_out: nn.Module) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.between = between
        self.fan_out = fan_out

    def forward(self, x: Tensor) -> Tensor:
        """Map the source tensor to the contribution; shapes are those of the layers."""
        result: Tensor = self.fan_out(self.between(self.fan_in(x)))
        return result


def between_layers(ops: Sequence[str]) -> nn.Module:
    """One module that does all of ``ops`` in order (dropout left out).

    Raises:
        GrowthError: An operation is unknown.
    """
    modules = [module for module in map(activation, ops) if not isinstance(module, nn.Identity)]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def he(layer: Layer) -> Layer:
    """Draw ``layer``'s weight from N(0, 2 / fan-in) and zero its bias; returns the layer.

    Source: He et al. 2015, arXiv 1502.01852, equation 10.
    """
    # Written out, because nn.init asks for a non-linearity by name that it turns into this same gain.
    nn.init.normal_(layer.weight, std=math.sqrt(2.0 / layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zero(layer: Layer) -> Layer:
    """Zero all of ``layer``'s parameters, so that the branch that it ends starts silent."""
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)
    return layer
