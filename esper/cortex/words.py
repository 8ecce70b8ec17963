"""Words of prose and of code, as the hashing encoder and BM25 count them."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["split_words"]

_WORD = re.compile(r"\w+")
_JOINT = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+")


def split_words(text: str) -> tuple[list[str], list[str]]:
    """Return the words of ``text`` in their order, and beside them the names that were taken apart for it.

    All in lower case: ``parseQuery`` and ``parse_query`` are the words ``parse`` and ``query``, and as a whole
    ``parsequery`` and ``parse_query``. A text without a letter or digit has no words.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    parts = _WORD.findall(_JOINT.sub(" ", text).lower())
    return parts, sorted(set(_WORD.findall(text.lower())).difference(parts))
