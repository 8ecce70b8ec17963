"""Texts become vectors: what every encoder promises.

Legend: n texts, D dimension of the vectors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from esper.cortex.extra import missing_extra
from esper.errors import ConfigError, DataFormatError

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise missing_extra("an encoder", "langchain-core") from error

__all__ = ["MAX_CHARS", "Encoder", "check_texts", "unit_vectors"]

MAX_CHARS = 2_000_000
"""Longest text that is encoded, in characters: longer ones are to be split."""

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Encoder(Embeddings):
    """LangChain's ``Embeddings``, whose vectors have length one and whose origin is known.

    The asynchronous methods (``aembed_documents``, ``aembed_query``) run in a thread of their own, so the
    event loop goes on meanwhile; an encoder may therefore be used from several threads.
    """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Name, settings and weights in short. Stores refuse an encoder with another one than they were made by."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """D."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of ``texts`` (n, D) float32, each of length one.

        Raises:
            DataFormatError: A text is blank, or longer than the encoder takes.
        """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """As :meth:`encode`, in LangChain's form."""
        vectors: list[list[float]] = self.encode(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of one text."""
        vector: list[float] = self.encode([text])[0].tolist()
        return vector


def check_texts(texts: Sequence[str], max_chars: int = MAX_CHARS) -> None:
    """Refuse what has no meaningful vector.

    Raises:
        ConfigError: ``texts`` is one string, or holds something else than strings.
        DataFormatError: A text is blank or too long.
    """
    if isinstance(texts, str):
        raise ConfigError("expected a list of texts, got one string; put it into a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"expected texts, got {type(text).__name__} as number {i}")
        if not text.strip():
            raise DataFormatError(f"expected text {i} to say something, but it is blank; leave it out")
        if len(text) > max_chars:
            raise DataFormatError(
                f"expected a text of at most {max_chars:,} characters, but number {i} has {len(text):,}; split it"
            )


def unit_vectors(vectors: Any, dimension: int, where: str) -> Vectors:
    """Return ``vectors`` as (n, D) float32 of length one.

    Args:
        vectors: (n, D) numbers.
        dimension: D that is expected.
        where: What they come from, for the error.

    Raises:
        DataFormatError: Another shape, a NaN or an infinity, or a vector of length zero.
    """
    try:
        found = np.asarray(vectors, dtype=np.float64)
    except (TypeError, ValueError) as error:  # rows of several lengths, or no numbers
        raise DataFormatError(f"expected vectors of {dimension} numbers from {where}: {error}") from error
    if found.ndim != 2 or found.shape[1] != dimension:
        raise DataFormatError(
            f"expected vectors of shape (n, {dimension}) from {where}, got {found.shape}; another encoder made them"
        )
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise DataFormatError(f"expected finite vectors from {where}, but number {row} holds NaN or infinity")
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not (lengths > 0).all():
        row = int(np.flatnonzero(lengths[:, 0] == 0)[0])
        raise DataFormatError(
            f"expected vectors with a direction from {where}, but number {row} is all zeros"
        )
    return (found / lengths).astype(np.float32)
