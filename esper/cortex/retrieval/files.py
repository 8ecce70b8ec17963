"""Which files below a folder are texts that someone wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.cortex.extra import missing_extra
from esper.errors import DataNotFoundError

try:
    from pathspec import GitIgnoreSpec
except ImportError as error:
    raise missing_extra("indexing", "pathspec") from error

__all__ = ["FoundFile", "find_files", "read_text"]

_IGNORE = ".gitignore"


@dataclass(frozen=True)
class FoundFile:
    """A file, and why it is passed over; ``skipped`` is empty where it is not."""

    path: Path
    skipped: str = ""


def find_files(roots: Sequence[Path], max_bytes: int) -> Iterator[FoundFile]:
    """Give every file below ``roots`` once, in the order of their names.

    Passed over are what a ``.gitignore`` names (those below a root, and above it up to the repository's folder),
    hidden files and folders, links, and files above ``max_bytes``; whole folders are given as one. A root itself
    is always looked into, if it is hidden or not.

    Raises:
        DataNotFoundError: A root is not there.
    """
    for root in roots:
        if not root.exists():
            raise DataNotFoundError(f"expected a file or folder at {root}, and there is none")
    seen: set[Path] = set()
    for root in roots:
        start = Path(os.path.abspath(root))
        found = (
            _walk(start, _ignores_above(start), max_bytes) if start.is_dir() else [_sized(start, max_bytes)]
        )
        for file in found:
            if file.path not in seen:
                seen.add(file.path)
                yield file


def read_text(content: bytes) -> str | None:
    """Return the text in ``content``; None if it is none in UTF-8, or holds a zero byte."""
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _walk(folder: Path, ignores: list[tuple[Path, GitIgnoreSpec]], max_bytes: int) -> Iterator[FoundFile]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield FoundFile(folder, "unreadable")
        return
    ignores = [*ignores, *_ignores_of(folder)]
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            yield FoundFile(path, "hidden")
        elif entry.is_symlink():
            yield FoundFile(path, "link")
        elif _is_ignored(path, entry.is_dir(), ignores):
            yield FoundFile(path, "ignored")
        elif entry.is_dir():
            yield from _walk(path, ignores, max_bytes)
        elif entry.is_file():
            yield _sized(path, max_bytes)


def _sized(path: Path, max_bytes: int) -> FoundFile:
    try:
        return FoundFile(path, "too large" if path.stat().st_size > max_bytes else "")
    except OSError:
        return FoundFile(path, "unreadable")


def _is_ignored(path: Path, is_folder: bool, ignores: list[tuple[Path, GitIgnoreSpec]]) -> bool:
    # The nearest file that says anything decides.
    for base, spec in reversed(ignores):
        name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
        verdict = spec.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _ignores_above(root: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    """Of the folders above ``root`` that belong to its repository, outermost first."""
    if (root / ".git").exists():
        return []
    above = []
    for parent in root.parents:
        above.append(parent)
        if (parent / ".git").exists():
            return [found for folder in reversed(above) for found in _ignores_of(folder)]
    return []


def _ignores_of(folder: Path) -> list[tuple[Path, GitIgnoreSpec]]:
    try:
        lines = (folder / _IGNORE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [(folder, GitIgnoreSpec.from_lines(lines))]
