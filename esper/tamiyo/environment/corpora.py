"""Texts that come with Python and scikit-learn, as tokens: what small language models are trained on.

Their wording changes a little with the versions of both, so :func:`corpus_digest` is written beside whatever
is measured on them. The vocabulary is fixed, so that a host's size does not depend on it.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from esper.errors import DataFormatError, DataNotFoundError
from esper.tamiyo.environment.specs import Corpus

__all__ = ["CORPORA", "VOCABULARY", "corpus_digest", "corpus_text", "corpus_tokens"]

CORPORA: tuple[Corpus, ...] = ("reference", "datasets", "source")
"""Python's language reference, scikit-learn's descriptions of its data sets, source code of Python's library."""

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()[]=_-*"
"""Character i is token i + 1; token 0 stands for every other one. Letters are read in lower case."""

_SOURCES = ("argparse", "difflib", "textwrap", "statistics", "heapq", "calendar", "configparser", "csv")
_MOST = 400_000
_LEAST = 20_000


@lru_cache(maxsize=len(CORPORA))
def corpus_text(corpus: Corpus) -> str:
    """The text called ``corpus``, in lower case, without runs of blanks.

    Raises:
        DataNotFoundError: This Python comes without it.
        DataFormatError: It is too short to train on.
    """
    text = _READERS[corpus]()
    lines = (" ".join(line.split()) for line in text.lower().splitlines())
    text = "\n".join(line for line in lines if line)[:_MOST]
    if len(text) < _LEAST:
        raise DataFormatError(
            f"corpus {corpus!r} should have at least {_LEAST} characters, this installation has {len(text)}; "
            "use a complete Python and scikit-learn"
        )
    return text


@lru_cache(maxsize=len(CORPORA))
def corpus_tokens(corpus: Corpus) -> Tensor:
    """The tokens (n,) int64 of :func:`corpus_text`."""
    table = {char: token for token, char in enumerate(VOCABULARY, start=1)}
    return torch.tensor([table.get(char, 0) for char in corpus_text(corpus)], dtype=torch.int64)


def corpus_digest(corpus: Corpus) -> str:
    """Names the wording of a corpus: two installations with the same digest train on the same text."""
    return hashlib.blake2b(corpus_text(corpus).encode(), digest_size=8).hexdigest()


def _reference() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataNotFoundError(
            "expected Python's language reference in the standard module pydoc_data.topics, but this Python "
            "comes without it; install the complete standard library"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def _datasets() -> str:
    folder = resources.files("sklearn.datasets.descr")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def _source() -> str:
    return "\n".join(inspect.getsource(__import__(name)) for name in _SOURCES)


_READERS = {"reference": _reference, "datasets": _datasets, "source": _source}
