"""Operations read off autograd nodes, and the modules made from their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import GrowthError
from esper.kasmina.activations import activation, is_elementwise, is_pool, op_name


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


ELEMENTWISE = [
    (nn.ReLU(), "relu"),
    (nn.ReLU6(), "hardtanh:0.0:6.0"),
    (lambda x: x.clamp(min=0), "relu"),
    (lambda x: x.clamp_min(0), "relu"),
    (lambda x: x.clamp(-2, 3), "hardtanh:-2.0:3.0"),
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu:tanh"),
    (nn.SiLU(), "silu"),
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Mish(), "mish"),
    (nn.SELU(), "selu"),
    (nn.Hardswish(), "hardswish"),
    (nn.Hardsigmoid(), "hardsigmoid"),
    (nn.LeakyReLU(0.2), "leaky_relu:0.2"),
    (nn.LeakyReLU(1 / 3), f"leaky_relu:{1 / 3!r}"),
    (nn.ELU(0.5), "elu:0.5"),
    (nn.CELU(0.7), "celu:0.7"),
    (nn.Hardtanh(-2, 2), "hardtanh:-2.0:2.0"),
    (nn.Softplus(2, 10), "softplus:2.0:10.0"),
    (torch.square, "pow:2"),
    (lambda x: x**3, "pow:3"),
    (torch.clone, "clone"),
    (lambda x: x.double(), "tocopy"),
]

POOLS = [
    (nn.MaxPool2d(3, 2, 1), "max_pool2d:3x3:2x2:1x1:1x1:0"),
    (nn.MaxPool2d((2, 3), ceil_mode=True), "max_pool2d:2x3:2x3:0x0:1x1:1"),
    (lambda x: F.max_pool2d(x, 2, dilation=2), "max_pool2d:2x2:2x2:0x0:2x2:0"),
    (nn.AvgPool2d(2), "avg_pool2d:2x2:2x2:0x0:0:1"),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "avg_pool2d:3x3:2x2:1x1:0:0"),
]

RESHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.view(2, -1),
    lambda x: x.flatten(1),
    lambda x: x.permute(0, 2, 3, 1),
    lambda x: x.transpose(1, 2),
    lambda x: x.transpose(1, 2).reshape(2, -1),
    lambda x: x.unsqueeze(1),
    lambda x: x[:1].squeeze(0),
]

UNKNOWN = [
    (lambda x: x + 1, "AddBackward0"),
    (lambda x: x * 2, "MulBackward0"),
    (lambda x: x * torch.sigmoid(x), "MulBackward0"),
    (lambda x: x * (torch.arange(8) > 3).float(), "MulBackward0"),  # a padding mask is no dropout
    (lambda x: x * torch.full((8,), 2.0), "MulBackward0"),
    (lambda x: x / 3, "DivBackward0"),
    (lambda x: x.clamp(max=1.0), "ClampBackward1"),
    (lambda x: x.abs() ** 0.5, "PowBackward0"),
    (lambda x: x.softmax(-1), "SoftmaxBackward0"),
    (lambda x: x.mean((2, 3)), "MeanBackward1"),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "AvgPool2DBackward0"),
    (lambda x: x[:, 0], "SelectBackward0"),
]


@pytest.mark.parametrize(("f", "name"), ELEMENTWISE + POOLS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_name_read_off_a_node_gives_back_the_operation(f, name):
    x = image()
    y = f(x)
    assert op_name(y.grad_fn) == name
    torch.testing.assert_close(activation(name)(x).to(y.dtype), y)


@pytest.mark.parametrize("name", [name for _, name in ELEMENTWISE] + ["identity", "dropout"])
def test_units_stay_units_through_elementwise_operations(name):
    assert is_elementwise(name)
    assert not is_pool(name)


@pytest.mark.parametrize("name", [name for _, name in POOLS])
def test_pools_are_not_elementwise(name):
    assert is_pool(name)
    assert not is_elementwise(name)


@pytest.mark.parametrize("index", range(len(RESHAPES)))
def test_moving_entries_is_a_reshape(index):
    name = op_name(RESHAPES[index](image()).grad_fn)
    assert name == "reshape"
    assert not is_elementwise(name)


@pytest.mark.parametrize(("f", "name"), UNKNOWN, ids=[f"{i}-{name}" for i, (_, name) in enumerate(UNKNOWN)])
def test_what_is_not_understood_keeps_its_node_s_name(f, name):
    assert op_name(f(image()).grad_fn) == name
    assert not is_elementwise(name)
    assert not is_pool(name)


@pytest.mark.parametrize(
    "f",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.5),
        lambda x: F.dropout(x, 0.3, True),
        lambda x: torch.native_dropout(x, 0.3, True)[0],
    ],
)
def test_dropout_is_told_by_its_mask(f):
    torch.manual_seed(0)
    assert op_name(f(image()).grad_fn) == "dropout"


def test_an_in_place_activation_is_named_as_well():
    assert op_name(F.relu_(image() * 1).grad_fn) == "relu"


@pytest.mark.parametrize(
    ("op", "text"),
    [
        ("AddBackward0", "no module for operation 'AddBackward0'; known are relu, gelu"),
        ("reshape", "no module for operation 'reshape'"),
        ("leaky_relu:x", "settings of operation 'leaky_relu:x' cannot be read"),
        ("relu:0.1:0.2:0.3", "cannot be read"),
        ("max_pool2d:2", "cannot be read"),
        ("pow", "cannot be read"),
    ],
)
def test_a_name_that_means_nothing_is_refused(op, text):
    with pytest.raises(GrowthError, match=text):
        activation(op)
