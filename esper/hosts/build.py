"""Hosts by name: from plain values to a config, from a config to a network, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from math import prod
from typing import Any

from esper.errors import ConfigError
from esper.hosts.cnn import CNN, CNNConfig
from esper.hosts.encoder import Encoder, EncoderConfig
from esper.hosts.gpt import GPT, GPTConfig
from esper.hosts.mlp import MLP, MLPConfig

__all__ = ["FAMILIES", "HostConfig", "build_host", "fit_host", "host_from_dict", "host_to_dict"]

HostConfig = MLPConfig | CNNConfig | GPTConfig | EncoderConfig

FAMILIES: dict[str, type[HostConfig]] = {
    "mlp": MLPConfig,
    "cnn": CNNConfig,
    "gpt": GPTConfig,
    "encoder": EncoderConfig,
}


def build_host(config: HostConfig) -> MLP | CNN | GPT | Encoder:
    """Build the network that ``config`` describes; its new weights come from torch's global generator."""
    if isinstance(config, MLPConfig):
        return MLP(config)
    if isinstance(config, CNNConfig):
        return CNN(config)
    if isinstance(config, GPTConfig):
        return GPT(config)
    if isinstance(config, EncoderConfig):
        return Encoder(config)
    raise ConfigError(
        f"build_host expects one of {[c.__name__ for c in FAMILIES.values()]}, got {type(config).__name__}"
    )


def host_from_dict(values: Mapping[str, Any]) -> HostConfig:
    """Read a host config from plain values: ``{"family": "mlp", "hidden": [16, 4], ...}``.

    Raises:
        ConfigError: On an unknown family or field, or a value its config refuses.
    """
    rest = dict(values)
    family = rest.pop("family", None)
    if family not in FAMILIES:
        raise ConfigError(f"a host needs `family`, one of {sorted(FAMILIES)}, got {family!r}")
    config = FAMILIES[family]
    known = {field.name for field in fields(config)}
    if unknown := sorted(set(rest) - known):
        raise ConfigError(f"host family {family!r} has the fields {sorted(known)}, got also {unknown}")
    return config(**rest)


def host_to_dict(config: HostConfig) -> dict[str, Any]:
    """Write a host config as plain values that a weights-only checkpoint may hold."""
    family = next(name for name, cls in FAMILIES.items() if type(config) is cls)
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
    return {"family": family, **plain}


def fit_host(config: HostConfig, input_shape: tuple[int, ...], num_classes: int) -> HostConfig:
    """Return ``config`` with its input and output sizes taken from the data.

    Args:
        config: Any host config; its inner shape is kept.
        input_shape: Of one sample, without the batch: (F,), (C, H, W), or (T,) tokens for a GPT
            or an encoder.
        num_classes: Logits wanted; for text the vocabulary's size.

    Raises:
        ConfigError: If samples are not what the family reads: images for a CNN, tokens for a GPT or an encoder.
    """
    if isinstance(config, MLPConfig):
        return replace(config, in_features=prod(input_shape), num_classes=num_classes)
    if isinstance(config, CNNConfig):
        if len(input_shape) != 3:
            raise ConfigError(
                f"a CNN reads images (C, H, W), but the data's samples have shape {input_shape}; "
                "choose the data's image form, or an MLP"
            )
        return replace(config, in_channels=input_shape[0], num_classes=num_classes)
    if len(input_shape) != 1:
        reader = "an encoder" if isinstance(config, EncoderConfig) else "a GPT"
        raise ConfigError(
            f"{reader} reads token sequences (T,), but the data's samples have shape {input_shape}"
        )
    if isinstance(config, EncoderConfig):
        return replace(config, max_length=input_shape[0], num_classes=num_classes)
    return replace(config, context=input_shape[0], vocab_size=num_classes)
