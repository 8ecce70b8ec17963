"""An encoder by its name, as configs and stores write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from esper.cortex.encoder.base import Encoder
from esper.cortex.encoder.cache import CachedEncoder
from esper.cortex.encoder.hashing import HashingConfig, HashingEncoder
from esper.cortex.encoder.minilm import MiniLMConfig, MiniLMEncoder
from esper.cortex.encoder.wrapped import WrappedConfig, WrappedEncoder
from esper.errors import ConfigError

__all__ = ["build_encoder", "describe_encoder"]


def build_encoder(name: str, settings: Mapping[str, Any] | None = None) -> Encoder:
    """Return the encoder ``name``.

    Args:
        name: ``hashing``, ``minilm``, or ``module:Class`` of any ``Embeddings`` of LangChain.
        settings: Fields of :class:`HashingConfig` or :class:`MiniLMConfig`, or arguments of the class.

    Raises:
        ConfigError: There is no such encoder, or it has no such setting.
        EsperError: As the encoder's constructor.
    """
    given = dict(settings or {})
    try:
        if name == "hashing":
            return HashingEncoder(HashingConfig(**given))
        if name == "minilm":
            return MiniLMEncoder(MiniLMConfig(**given))
    except TypeError as error:
        raise ConfigError(f"the encoder {name} does not take the settings {given}: {error}") from error
    if ":" in name:
        return WrappedEncoder(WrappedConfig(name, given))
    raise ConfigError(
        f"there is no encoder {name!r}; there are hashing, minilm, and MODULE:CLASS of LangChain's Embeddings"
    )


def describe_encoder(encoder: Encoder) -> tuple[str, dict[str, Any]] | None:
    """Return the name and settings that :func:`build_encoder` makes ``encoder`` from; None for a class of one's own."""
    if isinstance(encoder, CachedEncoder):
        return describe_encoder(encoder.encoder)
    if type(encoder) is HashingEncoder:
        return "hashing", asdict(encoder.config)
    if type(encoder) is MiniLMEncoder:
        return "minilm", asdict(encoder.config)
    if type(encoder) is WrappedEncoder:
        return encoder.config.path, dict(encoder.config.settings)
    return None
