"""An encoder without weights: words, word pairs and pieces of words, hashed into a vector.

Signed feature hashing (Weinberger et al. 2009, arXiv 0902.2206) of word and character n-grams. Deviations: counts
are damped (``1 + log tf``), and each kind of feature gets a fixed share of the vector's energy, so that the many
pieces of words do not drown the words. It knows nothing of synonyms; it needs nothing and takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from esper.cortex.encoder.base import Encoder, Vectors, check_texts
from esper.cortex.words import split_words
from esper.errors import ConfigError

__all__ = ["HashingConfig", "HashingEncoder"]

_VERSION = 1  # of the arithmetic below: another one makes other vectors
_PIECE_CHARS = (3, 4, 5)
_SPACE = ord(" ")
_FUNCTION_WORDS = frozenset(
    {
        "a", "an", "and", "are", "as", "at", "be", "but", "by", "can", "do", "does", "for", "from", "has",
        "have", "how", "i", "if", "in", "into", "is", "it", "its", "me", "my", "no", "not", "of", "on",
        "or", "our", "so", "that", "the", "their", "them", "then", "there", "these", "they", "this", "to",
        "was", "we", "were", "what", "when", "where", "which", "will", "with", "would", "you", "your",
        "self", "return",
    }
)  # fmt: skip
_FUNCTION_WEIGHT = 0.1

_Hashes = np.ndarray[Any, np.dtype[np.uint64]]
_BASE = np.uint64(0x100000001B3)
_SALTS = {"word": np.uint64(0x9E3779B97F4A7C15), "pair": np.uint64(0xD1B54A32D192ED03)}


@dataclass(frozen=True)
class HashingConfig:
    """What the vectors are made of.

    Attributes:
        dimension: D.
        pairs: Share of the energy that pairs of neighbouring words have.
        pieces: Share of pieces of 3 to 5 characters within words; single words have the rest.

    The defaults found the most functions of scikit-learn and networkx by their docstrings (`esper bench retrieval`).
    """

    dimension: int = 1024
    pairs: float = 0.05
    pieces: float = 0.5

    def __post_init__(self) -> None:
        if not 16 <= self.dimension <= 1 << 20:
            raise ConfigError(f"HashingConfig.dimension must lie in [16, 2**20], got {self.dimension}")
        if min(self.pairs, self.pieces) < 0 or self.pairs + self.pieces >= 1:
            raise ConfigError(
                "HashingConfig.pairs and .pieces must be at least 0 and below 1 together, got "
                f"{self.pairs} and {self.pieces}"
            )


class HashingEncoder(Encoder):
    """See the module. ``camelCase`` and ``snake_case`` count as their words and as a whole.

    Args:
        config: What the vectors are made of.
    """

    def __init__(self, config: HashingConfig | None = None) -> None:
        self.config = config or HashingConfig()

    @property
    def fingerprint(self) -> str:
        """Settings and the version of the arithmetic; there are no weights."""
        c = self.config
        return f"hashing-{_VERSION}:dimension={c.dimension},pairs={c.pairs},pieces={c.pieces}"

    @property
    def dimension(self) -> int:
        """D."""
        return self.config.dimension

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See :meth:`Encoder.encode`."""
        check_texts(texts)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for i, text in enumerate(texts):
            vectors[i] = self._vector(text)
        return vectors

    def _vector(self, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        parts, wholes = split_words(text)
        if not parts:  # nothing but punctuation: that is its word
            parts = ["".join(text.split())]
        words = _word_hashes(parts)
        plain = np.fromiter((part in _FUNCTION_WORDS for part in parts), dtype=bool, count=len(parts))
        total = np.zeros(self.dimension)
        shares = (1.0 - self.config.pairs - self.config.pieces, self.config.pairs, self.config.pieces)
        singles = np.concatenate([words, _word_hashes(wholes)])
        weights = np.ones(len(singles))
        weights[: len(parts)][plain] = _FUNCTION_WEIGHT
        pairs = words[:-1] * _BASE + words[1:] + _SALTS["pair"]
        for share, hashes, weight in (
            (shares[0], singles, weights),
            (shares[1], pairs, None),
            (shares[2], _piece_hashes(" ".join(parts)), None),
        ):
            if share and len(hashes):
                total += self._block(hashes, weight, share)
        return total / np.linalg.norm(total)

    def _block(
        self, hashes: _Hashes, weights: np.ndarray[Any, Any] | None, share: float
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """One kind of feature, hashed to (D,), with ``share`` of the energy."""
        unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        values = 1.0 + np.log(counts)
        if weights is not None:
            values *= weights[first]
        mixed = _mixed(unique)
        values *= np.sqrt(share / (values @ values))
        # The lowest bit is the sign, so the bucket comes from the others.
        signed = np.where(mixed & np.uint64(1), values, -values)
        buckets = ((mixed >> np.uint64(1)) % np.uint64(self.dimension)).astype(np.int64)
        block: Any = np.bincount(buckets, weights=signed, minlength=self.dimension)
        # Two features may meet in one bucket with opposite signs; a text of one or two must not vanish.
        if not block.any():
            block = np.bincount(buckets, weights=values, minlength=self.dimension)
        return block


def _word_hashes(words: Sequence[str]) -> _Hashes:
    numbers = (crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(numbers, dtype=np.uint64, count=len(words)) * _BASE + _SALTS["word"]


def _piece_hashes(text: str) -> _Hashes:
    """Hashes of all windows that do not reach over a gap between words; the gap itself marks their ends."""
    codes = np.frombuffer(f" {text} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    gap = codes == _SPACE
    found = []
    hashes, crossing = codes, np.zeros(len(codes), dtype=bool)
    for n in range(2, _PIECE_CHARS[-1] + 1):
        if len(codes) < n:
            break
        hashes = hashes[:-1] * _BASE + codes[n - 1 :]
        if n > 2:  # the character before the last is now inside the window
            crossing = crossing[:-1] | gap[n - 2 : -1]
        else:
            crossing = crossing[:-1]
        if n in _PIECE_CHARS:
            found.append(hashes[~crossing] + np.uint64(n) * _BASE)
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


def _mixed(hashes: _Hashes) -> _Hashes:
    """splitmix64's finaliser (Steele et al. 2014): every bit of the input moves every bit of the output."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
