"""A small convolutional classifier: convolutions, global average pooling, a linear head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from esper.errors import ConfigError
from esper.hosts.common import activation_by_name, nearest_width, num_parameters, require_positive

__all__ = ["CNN", "CNNConfig"]

Norm = Literal["none", "group", "batch"]


@dataclass(frozen=True)
class CNNConfig:
    """Shape of a :class:`CNN`.

    Attributes:
        in_channels: Channels of the images.
        widths: Output channels of each convolution. The default has a 4-channel waist on purpose.
        strides: Stride of each convolution, as many as ``widths``.
        kernel_size: Side of the (odd) square kernel; padding keeps the size at stride 1.
        num_classes: Outputs (logits).
        norm: After each convolution: "none", "group" or "batch". Batch norm keeps running statistics,
            which extra forward passes of a probe must not move; "group" has none.
        activation: One of :data:`esper.hosts.common.ACTIVATIONS`.
    """

    in_channels: int = 1
    widths: tuple[int, ...] = (16, 4, 32)
    strides: tuple[int, ...] = (2, 1, 2)
    kernel_size: int = 3
    num_classes: int = 10
    norm: Norm = "group"
    activation: str = "relu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "strides", tuple(self.strides))
        require_positive(
            "CNNConfig",
            in_channels=self.in_channels,
            widths=self.widths,
            strides=self.strides,
            kernel_size=self.kernel_size,
            num_classes=self.num_classes,
        )
        if not self.widths or len(self.widths) != len(self.strides):
            raise ConfigError(
                f"CNNConfig needs one stride a convolution and at least one convolution, "
                f"got widths={self.widths} and strides={self.strides}"
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"CNNConfig.kernel_size must be odd, so that padding is even, got {self.kernel_size}"
            )
        if self.norm not in get_args(Norm):
            raise ConfigError(f"CNNConfig.norm must be one of {get_args(Norm)}, got {self.norm!r}")
        activation_by_name(self.activation)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the network, without building it."""
        channels = (self.in_channels, *self.widths)
        per_output = self.kernel_size**2
        # A convolution before a norm has no bias: the norm's own shift does its work.
        extra = 1 if self.norm == "none" else 2
        convs = sum((c_in * per_output + extra) * c_out for c_in, c_out in pairwise(channels))
        return convs + (self.widths[-1] + 1) * self.num_classes

    def uniform_like(self, num_parameters: int) -> CNNConfig:
        """Return the config of equal depth and strides with one width, nearest to ``num_parameters``."""
        require_positive("uniform_like", num_parameters=num_parameters)
        depth = len(self.widths)
        width = nearest_width(lambda w: replace(self, widths=(w,) * depth).num_parameters, num_parameters)
        return replace(self, widths=(width,) * depth)


def _make_norm(norm: Literal["group", "batch"], channels: int) -> nn.Module:
    """Return the normalisation after a convolution of ``channels`` outputs."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, 8), channels)  # at most 8 groups, for any width


class CNN(nn.Module):
    """``head(mean_hw(act(norm(conv(...)))))``.

    Children: ``layers`` (ModuleList of Conv2d), ``norms`` (ModuleList, one a convolution, empty
    without norm), ``head`` (Linear).

    Shape:
        x: (B, in_channels, H, W) for any H and W; output: (B, num_classes).
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        self.config = config
        self.act = activation_by_name(config.activation)
        channels = (config.in_channels, *config.widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(
                c_in,
                c_out,
                config.kernel_size,
                stride=stride,
                padding=config.kernel_size // 2,
                bias=config.norm == "none",
            )
            for c_in, c_out, stride in zip(channels[:-1], channels[1:], config.strides, strict=True)
        )
        norm = config.norm
        self.norms = (
            nn.ModuleList()
            if norm == "none"
            else nn.ModuleList(_make_norm(norm, width) for width in config.widths)
        )
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        for index, conv in enumerate(self.layers):
            x = conv(x)
            if len(self.norms):
                x = self.norms[index](x)
            x = self.act(x)
        return self.head(x.mean(dim=(2, 3)))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, as built."""
        return num_parameters(self)

    def uniform_like(self, num_parameters: int) -> CNN:
        """Build a fresh CNN of equal depth and strides with one width, of nearly ``num_parameters``."""
        return CNN(self.config.uniform_like(num_parameters))
