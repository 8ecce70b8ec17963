"""The network that a spec describes, as the run begins with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.hosts.cnn import CNN, CNNConfig
from esper.hosts.common import activation_by_name
from esper.hosts.gpt import GPT, GPTConfig
from esper.hosts.mlp import MLP, MLPConfig
from esper.tamiyo.environment.specs import CNNShape, GPTShape, HostSpec, MLPShape, ResidualShape, derived_seed

__all__ = ["ResidualMLP", "build_network"]


class ResidualMLP(nn.Module):
    """``head(h_L)`` (+ ``shortcut(x)``), with ``h_0 = stem(x)`` and ``h_{l+1} = h_l + proj_l(act(fc_l(h_l)))``.

    A host that already has the ways around its layers: more of them rarely pay (GROWTH.md §6).

    Args:
        in_features: F.
        width: D of the residual stream.
        inner: Hidden units of each block.
        out_features: O.
        shortcut: Add a linear map of the input to the output.
        activation: Name of the elementwise function.

    Shape:
        x: (B, F); output: (B, O).
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        inner: Sequence[int],
        out_features: int,
        *,
        shortcut: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.act = activation_by_name(activation)
        self.stem = nn.Linear(in_features, width)
        self.fc = nn.ModuleList(nn.Linear(width, units) for units in inner)
        self.proj = nn.ModuleList(nn.Linear(units, width) for units in inner)
        self.head = nn.Linear(width, out_features)
        self.shortcut = nn.Linear(in_features, out_features, bias=False) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, F) to outputs (B, O)."""
        h = self.stem(x)
        for fc, proj in zip(self.fc, self.proj, strict=True):
            h = h + proj(self.act(fc(h)))
        y = self.head(h)
        return y if self.shortcut is None else y + self.shortcut(x)


def build_network(
    spec: HostSpec, input_shape: tuple[int, ...], num_outputs: int, *, repeat: int = 0
) -> nn.Module:
    """Build the host of ``spec`` with its first weights; torch's global random state is left as it was.

    Args:
        spec: Of the run.
        input_shape: Of one sample: (F,), (C, H, W), or (T,) tokens.
        num_outputs: Classes, vocabulary or regression targets.
        repeat: Another repeat of the run has other first weights.

    Raises:
        ConfigError: The architecture does not read such samples.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("weights", spec.seed, repeat))
        return _build(spec, input_shape, num_outputs)


def _build(spec: HostSpec, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    shape = spec.architecture
    if isinstance(shape, CNNShape):
        if len(input_shape) != 3:
            raise ConfigError(
                f"{spec.name}: a CNN reads images (C, H, W), its task gives samples of shape {input_shape}"
            )
        return CNN(
            CNNConfig(
                in_channels=input_shape[0],
                widths=shape.widths,
                strides=shape.strides,
                num_classes=num_outputs,
                norm=shape.norm,
            )
        )
    if len(input_shape) != 1:
        raise ConfigError(
            f"{spec.name}: a {type(shape).__name__} reads vectors or tokens, its task gives samples of shape "
            f"{input_shape}"
        )
    if isinstance(shape, GPTShape):
        return GPT(
            GPTConfig(
                vocab_size=num_outputs,
                context=input_shape[0],
                d_model=shape.d_model,
                depth=shape.depth,
                num_heads=shape.num_heads,
                mlp_ratio=shape.mlp_width / shape.d_model,
                tied=True,
            )
        )
    if isinstance(shape, ResidualShape):
        return ResidualMLP(
            input_shape[0],
            shape.width,
            shape.inner,
            num_outputs,
            shortcut=shape.shortcut,
            activation=shape.activation,
        )
    assert isinstance(shape, MLPShape)
    return MLP(
        MLPConfig(
            in_features=input_shape[0],
            hidden=shape.hidden,
            num_classes=num_outputs,
            activation=shape.activation,
        )
    )
