"""Names for what lies between two layers, and the modules that do the same.

An operation is written as its name and its settings: ``relu``, ``gelu:tanh``, ``leaky_relu:0.01``,
``max_pool2d:2x2:2x2:0x0:1x1:0``. :func:`op_name` reads the name off an autograd node; :func:`activation`
turns it back into a module, so that a seed's new units pass through what the host's own units pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from esper.errors import GrowthError

__all__ = ["Power", "activation", "is_activation", "is_elementwise", "is_pool", "op_name"]


class Power(nn.Module):
    """``x ** exponent`` for a whole positive exponent (squared ReLU is ``relu`` and then ``pow:2``)."""

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        """Raise every entry of ``x`` (any shape) to the power."""
        return x**self.exponent

    def extra_repr(self) -> str:
        return str(self.exponent)


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def _max_pool(kernel: str, stride: str, padding: str, dilation: str, ceil: str) -> nn.Module:
    return nn.MaxPool2d(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation), ceil_mode=ceil == "1")


def _avg_pool(kernel: str, stride: str, padding: str, ceil: str, count_padding: str) -> nn.Module:
    return nn.AvgPool2d(_pair(kernel), _pair(stride), _pair(padding), ceil == "1", count_padding == "1")


_IDENTITIES = ("identity", "clone", "tocopy", "dropout")
"""Leave the value alone; dropout does so in the mean and in evaluation, so a seed goes without."""

_ELEMENTWISE: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "mish": nn.Mish,
    "selu": nn.SELU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "leaky_relu": lambda slope="0.01": nn.LeakyReLU(float(slope)),
    "elu": lambda alpha="1.0": nn.ELU(float(alpha)),
    "celu": lambda alpha="1.0": nn.CELU(float(alpha)),
    "hardtanh": lambda low="-1.0", high="1.0": nn.Hardtanh(float(low), float(high)),
    "softplus": lambda beta="1.0", threshold="20.0": nn.Softplus(float(beta), float(threshold)),
    "pow": lambda exponent: Power(int(exponent)),
    **{name: nn.Identity for name in _IDENTITIES},
}

_POOLS: dict[str, Callable[..., nn.Module]] = {"max_pool2d": _max_pool, "avg_pool2d": _avg_pool}


def activation(op: str) -> nn.Module:
    """Build the module that does what ``op`` names; dropout gives the identity.

    Args:
        op: As :func:`op_name` writes it. ``identity`` is known too.

    Raises:
        GrowthError: The operation is unknown, or its settings cannot be read.
    """
    name, *settings = op.split(":")
    make = _ELEMENTWISE.get(name) or _POOLS.get(name)
    if make is None:
        known = ", ".join((*_ELEMENTWISE, *_POOLS))
        raise GrowthError(f"no module for operation {op!r}; known are {known}")
    try:
        return make(*settings)
    except (TypeError, ValueError) as error:
        raise GrowthError(f"the settings of operation {op!r} cannot be read: {error}") from error


def is_elementwise(op: str) -> bool:
    """Whether ``op`` maps every entry on its own by a known function, so that units stay units."""
    return op.split(":")[0] in _ELEMENTWISE


def is_activation(op: str) -> bool:
    """Whether ``op`` is a known element-wise non-linearity."""
    return is_elementwise(op) and op.split(":")[0] not in _IDENTITIES


def is_pool(op: str) -> bool:
    """Whether ``op`` is a known pooling of feature maps: channels stay channels, positions do not."""
    return op.split(":")[0] in _POOLS


def op_name(node: Any) -> str:
    """Name the operation behind an autograd node.

    Args:
        node: A ``grad_fn``; its graph must not have been freed, because settings are read off it.

    Returns:
        A name that :func:`activation` understands; ``reshape`` for whatever moves entries without
        changing them; or, for the rest, the node's own name (``AddBackward0``).
    """
    name: str = node.name()
    kind = name.removesuffix("0").removesuffix("1").removesuffix("Backward")
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind in _RESHAPES:
        return "reshape"
    # Other overloads (a product with a number, a power with a tensor) keep other things on their nodes.
    # (Of clamp it is the second one that takes numbers.)
    readable = name.endswith("Backward0") or name == "ClampBackward1"
    describe = _WITH_SETTINGS.get(kind) if readable else None
    return (describe(node) if describe else None) or name


_PLAIN = {
    "Relu": "relu",
    "Silu": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Mish": "mish",
    "Hardswish": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "Clone": "clone",
    "Alias": "clone",
    "ToCopy": "tocopy",
    "NativeDropout": "dropout",
    "FusedDropout": "dropout",
}

_RESHAPES = frozenset(
    ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Mt", "Unsqueeze", "Squeeze")
)


def _number(value: Any) -> str:
    return repr(float(value))


def _sizes(*values: Sequence[int]) -> str:
    return ":".join("x".join(str(int(v)) for v in value) for value in values)


def _gelu(node: Any) -> str:
    return "gelu" if node._saved_approximate == "none" else f"gelu:{node._saved_approximate}"


def _elu(node: Any) -> str | None:
    alpha, scale = float(node._saved_alpha), float(node._saved_scale)
    if float(node._saved_input_scale) != 1.0:
        return None
    if scale == 1.0:
        return f"elu:{_number(alpha)}"
    return "selu" if abs(alpha - 1.6732632423543772) + abs(scale - 1.0507009873554805) < 1e-9 else None


def _clamp(node: Any) -> str | None:
    low, high = node._saved_min, getattr(node, "_saved_max", None)
    if low is not None and high is not None:
        return f"hardtanh:{_number(low)}:{_number(high)}"
    return "relu" if high is None and low == 0 else None


def _power(node: Any) -> str | None:
    exponent = float(node._saved_exponent)
    return f"pow:{int(exponent)}" if exponent >= 1 and exponent.is_integer() else None


def _max_pool_name(node: Any) -> str:
    stride = node._saved_stride or node._saved_kernel_size  # torch leaves it empty when it is the kernel's
    sizes = _sizes(node._saved_kernel_size, stride, node._saved_padding, node._saved_dilation)
    return f"max_pool2d:{sizes}:{int(node._saved_ceil_mode)}"


def _avg_pool_name(node: Any) -> str | None:
    if node._saved_divisor_override is not None:
        return None
    sizes = _sizes(
        node._saved_kernel_size, node._saved_stride or node._saved_kernel_size, node._saved_padding
    )
    return f"avg_pool2d:{sizes}:{int(node._saved_ceil_mode)}:{int(node._saved_count_include_pad)}"


def _dropout(node: Any) -> str | None:
    """On the CPU dropout is a product with a constant mask of zeros and 1/(1-p)."""
    mask = node._saved_other
    if node._saved_self is not None or mask is None or mask.dim() == 0 or mask.requires_grad:
        return None
    kept = mask[mask != 0]
    if kept.numel() in (0, mask.numel()):  # no zeros: a scale, which a seed may not leave out
        return None
    return "dropout" if bool((kept == kept.max()).all()) and float(kept.max()) > 1.0 else None


_WITH_SETTINGS: dict[str, Callable[[Any], str | None]] = {
    "Gelu": _gelu,
    "Elu": _elu,
    "Celu": lambda node: f"celu:{_number(node._saved_alpha)}",
    "LeakyRelu": lambda node: f"leaky_relu:{_number(node._saved_negative_slope)}",
    "Hardtanh": lambda node: f"hardtanh:{_number(node._saved_min_val)}:{_number(node._saved_max_val)}",
    "Softplus": lambda node: f"softplus:{_number(node._saved_beta)}:{_number(node._saved_threshold)}",
    "Clamp": _clamp,
    "ClampMin": _clamp,
    "Pow": _power,
    "MaxPool2DWithIndices": _max_pool_name,
    "AvgPool2D": _avg_pool_name,
    "Mul": _dropout,
}
