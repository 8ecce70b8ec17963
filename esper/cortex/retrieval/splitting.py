"""Files cut into passages that know their lines."""

from __future__ import annotations

import bisect
from functools import lru_cache
from pathlib import Path
from typing import Literal

from langchain_core.documents import Document

from esper.cortex.extra import missing_extra

try:
    from langchain_text_splitters import Language, RecursiveCharacterTextSplitter
except ImportError as error:
    raise missing_extra("retrieval", "langchain-text-splitters") from error

__all__ = ["language_of", "split_text"]

TextLanguage = Literal["python", "markdown", "text"]

_SUFFIXES: dict[str, TextLanguage] = {
    ".py": "python",
    ".pyi": "python",
    ".md": "markdown",
    ".markdown": "markdown",
}
# LangChain's own separators for Python know methods that are indented by a tab alone, and part decorators from
# what they decorate.
_PYTHON = [
    r"\n(?:@[^\n]*\n)*(?:class |def |async def )",
    r"\n(?:[ \t]+@[^\n]*\n)*[ \t]+(?:class |def |async def )",
    r"\n\n",
    r"\n",
    " ",
    "",
]


def language_of(path: Path) -> TextLanguage:
    """By what a file's name ends in."""
    return _SUFFIXES.get(path.suffix.lower(), "text")


def split_text(text: str, language: TextLanguage, max_chars: int) -> list[Document]:
    """Cut ``text`` at functions, headings, paragraphs or lines, whichever makes passages of at most ``max_chars``.

    Returns:
        The passages in their order, with ``start_line`` and ``end_line`` (from 1, both included) and ``language``.
        They do not overlap, and leave out nothing but white space.
    """
    newlines = [i for i, character in enumerate(text) if character == "\n"]
    passages = _splitter(language, max_chars).create_documents([text])
    for passage in passages:
        start = passage.metadata.pop("start_index")
        assert text.startswith(passage.page_content, start), (
            "a splitter that does not overlap knows its places"
        )
        end = start + len(passage.page_content) - 1
        passage.metadata.update(
            start_line=bisect.bisect_left(newlines, start) + 1,
            end_line=bisect.bisect_left(newlines, end) + 1,
            language=language,
        )
    return passages


@lru_cache
def _splitter(language: TextLanguage, max_chars: int) -> RecursiveCharacterTextSplitter:
    # Overlapping passages would be looked up in the text by what they say, which may stand there twice.
    if language == "markdown":
        return RecursiveCharacterTextSplitter.from_language(
            Language.MARKDOWN, chunk_size=max_chars, chunk_overlap=0, add_start_index=True
        )
    if language == "python":
        return RecursiveCharacterTextSplitter(
            separators=_PYTHON,
            is_separator_regex=True,
            chunk_size=max_chars,
            chunk_overlap=0,
            add_start_index=True,
        )
    return RecursiveCharacterTextSplitter(chunk_size=max_chars, chunk_overlap=0, add_start_index=True)
