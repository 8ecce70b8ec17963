"""Where a seed can attach, and what its blueprint may know about the place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from torch import nn

__all__ = ["BuildContext", "Site", "SiteKind", "site_name"]

SiteKind = Literal["parallel", "bypass", "stack"]


def site_name(kind: SiteKind, source: str, target: str) -> str:
    """``parallel:fc1``, ``bypass:fc1->fc2`` or ``stack:blocks.0``."""
    return f"bypass:{source}->{target}" if kind == "bypass" else f"{kind}:{target}"


class Site(msgspec.Struct, frozen=True):
    """A place for a seed: from the *input* of layer ``source`` to the *output* of layer ``target``.

    Attributes:
        name: As :func:`site_name` writes it.
        kind: ``parallel`` (source is target), ``bypass`` (over a non-linearity) or ``stack``.
        source: Qualified name of the layer whose input the seed reads.
        target: Qualified name of the layer to whose output the seed adds.
        source_shape: Shape of one sample of the source tensor.
        target_shape: Shape of one sample of the target output.
        ops: What lies between source layer and target layer, in order, as ``relu`` or
            ``leaky_relu:0.01``; empty for ``parallel`` and ``stack``.
        through: Parameterised layers between the two (a BatchNorm), by name.
        long: A bypass from the host's input, or an early layer, to an output layer.
        functional: The target's weight is used without calling it; seeds act on the weight.
        image: The target's output is a feature map [channels, height, width].
        blueprints: Names of the registered blueprints that fit here.
        source_samples: Dimension of the source tensor that counts samples; None where it is not known.
        target_samples: The same of the target output.
    """

    name: str
    kind: SiteKind
    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    ops: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    long: bool = False
    functional: bool = False
    image: bool = False
    blueprints: tuple[str, ...] = ()
    source_samples: int | None = 0
    target_samples: int | None = 0

    @property
    def positions(self) -> int:
        """Output positions a sample: pixels of a feature map, tokens of a sequence, 1 for a vector."""
        return math.prod(self.target_shape[1:] if self.image else self.target_shape[:-1])

    @property
    def target_units(self) -> int:
        """Width of the target's output: channels of a feature map, else the last dimension."""
        return self.target_shape[0] if self.image else self.target_shape[-1]


@dataclass(frozen=True)
class BuildContext:
    """Everything a blueprint may use to build its branch.

    Attributes:
        site: The place.
        source_layer: The host layer whose input the branch reads (geometry only; never modify it).
        target_layer: The host layer to whose output the branch adds.
        output_projections: For ``stack``: names, inside the block, of the layers that write to its
            residual stream.
    """

    site: Site
    source_layer: nn.Module
    target_layer: nn.Module
    output_projections: tuple[str, ...] = field(default=())
