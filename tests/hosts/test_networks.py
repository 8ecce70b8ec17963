"""Reference networks: shapes, parameter counts, and uniform networks of a wanted size."""

from __future__ import annotations

import pytest
import torch

from esper.errors import ConfigError
from esper.hosts import (
    CNN,
    GPT,
    MLP,
    CNNConfig,
    GPTConfig,
    HostConfig,
    MLPConfig,
    build_host,
    fit_host,
    host_from_dict,
    host_to_dict,
)
from esper.hosts.common import nearest_width

SMALL_GPT = GPTConfig(vocab_size=11, context=8, d_model=12, depth=2, num_heads=3, mlp_ratio=1.5)

CONFIGS: list[HostConfig] = [
    MLPConfig(),
    MLPConfig(in_features=7, hidden=(), num_classes=3),
    MLPConfig(hidden=(5,), activation="tanh"),
    CNNConfig(),
    CNNConfig(in_channels=3, widths=(6, 5), strides=(1, 2), norm="none", kernel_size=5),
    CNNConfig(widths=(7,), strides=(1,), norm="batch"),
    GPTConfig(),
    SMALL_GPT,
    GPTConfig(vocab_size=11, context=8, d_model=12, depth=1, num_heads=3, tied=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_declared_parameter_count_is_that_of_the_built_network(config: HostConfig) -> None:
    host = build_host(config)
    assert config.num_parameters == host.num_parameters == sum(p.numel() for p in host.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_config_survives_plain_values(config: HostConfig) -> None:
    assert host_from_dict(host_to_dict(config)) == config


def test_mlp_maps_flat_and_image_inputs_alike() -> None:
    host = MLP(MLPConfig())
    x = torch.randn(5, 1, 8, 8)
    assert host(x).shape == (5, 10)
    assert torch.equal(host(x), host(x.flatten(1)))
    assert [layer.out_features for layer in host.layers] == [16, 4, 16, 6]


def test_cnn_accepts_any_image_size() -> None:
    host = CNN(CNNConfig(in_channels=2))
    assert host(torch.randn(3, 2, 28, 28)).shape == (3, 10)
    assert host(torch.randn(3, 2, 9, 13)).shape == (3, 10)
    assert [name for name, _ in host.named_children()] == ["layers", "norms", "head"]


def test_gpt_sees_only_the_past() -> None:
    torch.manual_seed(0)
    host = GPT(SMALL_GPT).eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    logits, logits_changed = host(tokens), host(changed)
    assert logits.shape == (2, 8, 11)
    torch.testing.assert_close(logits[:, :5], logits_changed[:, :5])
    assert not torch.allclose(logits[:, 5:], logits_changed[:, 5:])


def test_gpt_blocks_keep_their_shape_and_take_gradient() -> None:
    host = GPT(SMALL_GPT)
    x = torch.randn(2, 8, 12)
    assert host.blocks[0](x).shape == x.shape
    host(torch.randint(11, (2, 8))).square().mean().backward()
    assert all(p.grad is not None for p in host.parameters())


def test_gpt_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    host = GPT(GPTConfig(vocab_size=11, context=8, d_model=12, depth=1, num_heads=3, dropout=0.5))
    tokens = torch.randint(11, (2, 8))
    assert not torch.equal(host(tokens), host(tokens))
    host.eval()
    assert torch.equal(host(tokens), host(tokens))


def test_gpt_refuses_a_sequence_beyond_its_context() -> None:
    with pytest.raises(ConfigError, match=r"at most context=8 tokens, got 9"):
        GPT(SMALL_GPT)(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("target", [200, 1360, 3000, 20_000])
def test_uniform_mlp_is_the_nearest_of_its_depth(target: int) -> None:
    found = MLPConfig().uniform_like(target)
    assert len(set(found.hidden)) == 1
    assert len(found.hidden) == 4
    width = found.hidden[0]
    misses = {
        w: abs(MLPConfig(hidden=(w,) * 4).num_parameters - target) for w in (width - 1, width, width + 1) if w
    }
    assert min(misses, key=misses.__getitem__) == width


@pytest.mark.parametrize("target", [300, 2306, 30_000])
def test_uniform_cnn_is_the_nearest_with_its_strides(target: int) -> None:
    config = CNNConfig()
    found = config.uniform_like(target)
    assert found.strides == config.strides
    width = found.widths[0]
    assert found.widths == (width,) * 3
    for other in (width - 1, width + 1):
        if other:
            rival = CNNConfig(widths=(other,) * 3).num_parameters
            assert abs(found.num_parameters - target) <= abs(rival - target)


@pytest.mark.parametrize("depth", [1, 2, 4, 6])
def test_uniform_gpt_finds_a_grown_depth_again(depth: int) -> None:
    start = GPTConfig(depth=2)
    grown = GPTConfig(depth=depth)
    assert start.uniform_like(grown.num_parameters) == grown


@pytest.mark.parametrize("target", [60_000, 112_640, 137_000, 400_001])
def test_uniform_gpt_is_within_one_percent(target: int) -> None:
    found = GPTConfig().uniform_like(target)
    assert found.d_model == 64
    assert abs(found.num_parameters - target) <= 0.01 * target


def test_uniform_gpt_below_its_smallest_size_is_the_smallest() -> None:
    found = GPTConfig().uniform_like(1)
    assert (found.depth, found.mlp_width) == (1, 1)


def test_uniform_like_of_a_network_builds_it() -> None:
    for host, family in ((MLP(MLPConfig()), MLP), (CNN(CNNConfig()), CNN), (GPT(SMALL_GPT), GPT)):
        uniform = host.uniform_like(2 * host.num_parameters)
        assert type(uniform) is family
        assert uniform.num_parameters == pytest.approx(2 * host.num_parameters, rel=0.1)


def test_nearest_width_prefers_the_smaller_on_a_tie() -> None:
    assert nearest_width(lambda w: 10 * w, 25) == 2
    assert nearest_width(lambda w: 10 * w, 26) == 3
    assert nearest_width(lambda w: 10 * w, 1) == 1


@pytest.mark.parametrize(
    ("config", "shape", "num_classes", "expected"),
    [
        (MLPConfig(), (1, 28, 28), 10, MLPConfig(in_features=784)),
        (CNNConfig(), (3, 8, 8), 4, CNNConfig(in_channels=3, num_classes=4)),
        (GPTConfig(), (32,), 40, GPTConfig(context=32, vocab_size=40)),
    ],
)
def test_fit_host_takes_sizes_from_the_data(
    config: HostConfig, shape: tuple[int, ...], num_classes: int, expected: HostConfig
) -> None:
    assert fit_host(config, shape, num_classes) == expected


def test_fit_host_refuses_data_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"a CNN reads images \(C, H, W\), but .* shape \(64,\)"):
        fit_host(CNNConfig(), (64,), 10)
    with pytest.raises(ConfigError, match="a GPT reads token sequences"):
        fit_host(GPTConfig(), (1, 8, 8), 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MLPConfig(hidden=(4, 0)),
            r"MLPConfig\.hidden must hold integers of at least 1, got \(4, 0\)",
        ),
        (lambda: MLPConfig(activation="swoosh"), "activation must be one of .*'relu'.*, got 'swoosh'"),
        (lambda: MLPConfig(hidden=()).uniform_like(100), "at least one hidden layer"),
        (lambda: CNNConfig(widths=(4, 4), strides=(1,)), "one stride a convolution"),
        (lambda: CNNConfig(kernel_size=4), "kernel_size must be odd"),
        (lambda: CNNConfig(norm="layer"), "norm must be one of"),
        (lambda: GPTConfig(d_model=10, num_heads=4), "multiple of num_heads, got 10 and 4"),
        (lambda: GPTConfig(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda: GPTConfig(mlp_ratio=0.0), "mlp_ratio must give at least one unit"),
        (lambda: host_from_dict({"family": "rnn"}), r"one of \['cnn', 'encoder', 'gpt', 'mlp'\], got 'rnn'"),
        (lambda: host_from_dict({"family": "mlp", "width": 3}), r"got also \['width'\]"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
