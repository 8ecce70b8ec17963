"""Texts become vectors, behind LangChain's ``Embeddings``."""

from esper.cortex.encoder.base import Encoder, unit_vectors
from esper.cortex.encoder.build import build_encoder, describe_encoder
from esper.cortex.encoder.cache import CachedEncoder
from esper.cortex.encoder.hashing import HashingConfig, HashingEncoder
from esper.cortex.encoder.minilm import MiniLMConfig, MiniLMEncoder
from esper.cortex.encoder.wrapped import WrappedConfig, WrappedEncoder

__all__ = [
    "CachedEncoder",
    "Encoder",
    "HashingConfig",
    "HashingEncoder",
    "MiniLMConfig",
    "MiniLMEncoder",
    "WrappedConfig",
    "WrappedEncoder",
    "build_encoder",
    "describe_encoder",
    "unit_vectors",
]
