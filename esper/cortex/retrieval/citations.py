"""Passages for people: where they stand, and what they say, as text that cannot steer a terminal."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from langchain_core.documents import Document

__all__ = ["citation", "visible"]

_PLAIN = "\n\t"


def citation(document: Document, base: Path | None = None) -> str:
    """Return ``file:first-last``; relative to ``base`` where the file is below it.

    A document that did not come from a file is cited by its id.
    """
    source = document.metadata.get("source")
    if not isinstance(source, str):
        return _one_line(f"document {document.id}")
    if base is not None and Path(source).is_relative_to(base):
        source = os.path.relpath(source, base)
    start, end = document.metadata.get("start_line"), document.metadata.get("end_line")
    if start is None:
        return _one_line(source)
    return _one_line(f"{source}:{start}" if start == end else f"{source}:{start}-{end}")


def _one_line(text: str) -> str:
    # The name of a file may hold a line break, behind which it could look like a passage.
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def visible(text: str) -> str:
    """Return ``text`` with everything that is no plain character, line break or tab written out (``\\x1b``).

    That is: control characters (a terminal obeys some), and invisible ones that change the direction of reading or
    hide words from people.
    """
    return "".join(
        character
        if character in _PLAIN or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
