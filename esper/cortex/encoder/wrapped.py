"""Any other ``Embeddings`` of LangChain, by its import path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings

from esper.cortex.encoder.base import Encoder, Vectors, check_texts, unit_vectors
from esper.errors import ConfigError

__all__ = ["WrappedConfig", "WrappedEncoder"]


@dataclass(frozen=True)
class WrappedConfig:
    """Whose vectors.

    Attributes:
        path: ``module:Class`` of an ``Embeddings`` of LangChain.
        settings: Arguments of its constructor; what JSON can hold.
    """

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, name = self.path.partition(":")
        if not module or not name:
            raise ConfigError(f"WrappedConfig.path must be MODULE:CLASS, got {self.path!r}")
        try:
            json.dumps(dict(self.settings))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"WrappedConfig.settings must be what JSON can hold: {error}") from error


class WrappedEncoder(Encoder):
    """Checks what the other one returns and brings it to length one; its dimension is asked once, of a text.

    Its fingerprint is made of the import path, the settings, the package's version and the dimension: of weights
    that change behind one name (a service's) it knows nothing.

    Args:
        config: Whose vectors.

    Raises:
        ConfigError: There is no such class, it takes other settings, or it is no ``Embeddings``.
    """

    def __init__(self, config: WrappedConfig) -> None:
        self.config = config
        module, _, name = config.path.partition(":")
        try:
            kind = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"there is no {config.path} to encode with: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Embeddings)):
            raise ConfigError(f"expected {config.path} to be an Embeddings of LangChain, got {kind!r}")
        try:
            self._inner = kind(**config.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{config.path} does not take {dict(config.settings)}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """See the class."""
        settings = json.dumps(dict(self.config.settings), sort_keys=True)
        return f"langchain:{self.config.path},{settings},{self._version()},dimension={self.dimension}"

    @cached_property
    def dimension(self) -> int:
        """D."""
        return len(self._inner.embed_query("how many numbers has this text"))

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See :meth:`Encoder.encode`; by the other's ``embed_documents``."""
        check_texts(texts)
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = self._inner.embed_documents(list(texts))
        if len(vectors) != len(texts):
            raise ConfigError(f"{self.config.path} gave {len(vectors)} vectors for {len(texts)} texts")
        return unit_vectors(vectors, self.dimension, self.config.path)

    def embed_query(self, text: str) -> list[float]:
        """By the other's ``embed_query``, which may differ from its documents'."""
        check_texts([text])
        vector: list[float] = unit_vectors([self._inner.embed_query(text)], self.dimension, self.config.path)[
            0
        ].tolist()
        return vector

    def _version(self) -> str:
        package = self.config.path.partition(":")[0].partition(".")[0]
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"
