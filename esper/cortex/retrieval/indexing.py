"""Files brought into a store, and kept up with: only what has changed is encoded again.

A group of files is one transaction, in which what is known of a file (the hash of its content) and its passages
change together. A process that is killed loses the group in its hands; the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from langchain_core.documents import Document

from esper.cortex.retrieval.files import find_files, read_text
from esper.cortex.retrieval.splitting import language_of, split_text
from esper.cortex.retrieval.store import PassageStore
from esper.errors import ConfigError

__all__ = ["Collection", "IndexingConfig", "IndexingReport", "index_paths"]

Collection = Literal["codebase", "documentation", "issues", "patterns"]

_SPLITTING = 1  # of split_text: another one makes other passages of the same file
_GROUP = 256  # passages that are encoded and written together


@dataclass(frozen=True)
class IndexingConfig:
    """What is indexed, and how.

    Attributes:
        collection: Where the passages belong.
        max_chars: Longest passage.
        max_bytes: Largest file.
    """

    collection: Collection = "codebase"
    max_chars: int = 1000
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.collection not in get_args(Collection):
            raise ConfigError(
                f"IndexingConfig.collection must be one of {', '.join(get_args(Collection))}, got {self.collection!r}"
            )
        if not 50 <= self.max_chars <= 100_000:
            raise ConfigError(f"IndexingConfig.max_chars must lie in [50, 100000], got {self.max_chars}")
        if self.max_bytes < 1:
            raise ConfigError(f"IndexingConfig.max_bytes must be at least 1, got {self.max_bytes}")


@dataclass
class IndexingReport:
    """What a run found and did: numbers of files, then of passages.

    Attributes:
        new: Files that were not there before.
        changed: Files whose content is another than before.
        unchanged: Files that were left alone.
        deleted: Files that are gone, or are passed over now.
        skipped: Why files and folders were passed over -> how many.
        passages_added: Written.
        passages_removed: Of changed and deleted files.
        seconds: It took.
    """

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    passages_added: int = 0
    passages_removed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _File:
    path: str
    sha256: str
    passages: list[Document]


def index_paths(
    store: PassageStore,
    paths: Sequence[Path],
    config: IndexingConfig | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexingReport:
    """Bring the files below ``paths`` into ``store``, and take out those that are no longer there.

    Args:
        store: Where to.
        paths: Files and folders. What was indexed from elsewhere stays as it is.
        config: What is indexed, and how.
        on_progress: Called with the number of files done and of all.

    Raises:
        ConfigError: No paths.
        DataNotFoundError: One of ``paths`` is not there; nothing is changed then.
    """
    config = config or IndexingConfig()
    if not paths:
        raise ConfigError("expected files or folders to index, got none")
    began = time.perf_counter()
    report = IndexingReport()
    found = []
    own = Path(os.path.abspath(store.table.folder))
    for file in find_files(paths, config.max_bytes):
        if file.path.is_relative_to(own):
            report.skipped["the store itself"] += 1
        elif file.skipped:
            report.skipped[file.skipped] += 1
        else:
            found.append(file.path)
    known = _known(store, config.collection)
    kept: set[str] = set()
    group: list[_File] = []
    for done, path in enumerate(found, start=1):
        made = _read(path, known.get(str(path)), config, report)
        if made is not None:
            kept.add(str(path))
            if made.sha256 != known.get(str(path)):
                group.append(made)
        if sum(len(file.passages) for file in group) >= _GROUP:
            _write(store, group, config.collection, known, report)
            group = []
        if on_progress is not None:
            on_progress(done, len(found))
    _write(store, group, config.collection, known, report)
    roots = [os.path.abspath(path) for path in paths]
    gone = [path for path in known if path not in kept and _is_below(path, roots)]
    _forget(store, gone, config.collection, report)
    store.save()
    report.seconds = time.perf_counter() - began
    return report


def _known(store: PassageStore, collection: str) -> dict[str, str]:
    with store.table.database.reading() as db:
        return dict(
            db.execute("SELECT path, sha256 FROM files WHERE collection = ?", (collection,)).fetchall()
        )


def _read(path: Path, known: str | None, config: IndexingConfig, report: IndexingReport) -> _File | None:
    """The file with its passages, or without them if it is ``known``; None if it cannot be indexed."""
    try:
        content = path.read_bytes()
    except OSError:
        report.skipped["unreadable"] += 1
        return None
    text = read_text(content)
    if text is None:
        report.skipped["binary"] += 1
        return None
    digest = hashlib.sha256(f"{_SPLITTING} {config.max_chars} {language_of(path)}\n".encode())
    digest.update(content)
    sha256 = digest.hexdigest()
    if sha256 == known:
        report.unchanged += 1
        return _File(str(path), sha256, [])
    passages = [p for p in split_text(text, language_of(path), config.max_chars) if p.page_content.strip()]
    for passage in passages:
        passage.metadata.update(source=str(path), collection=config.collection)
        place = f"{config.collection}\n{path}\n{passage.metadata['start_line']}\n{passage.page_content}"
        passage.id = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    # A very long line gives passages that say the same on the same line.
    unique = list({passage.id: passage for passage in passages}.values())
    return _File(str(path), sha256, unique)


def _write(
    store: PassageStore, group: list[_File], collection: str, known: dict[str, str], report: IndexingReport
) -> None:
    passages = [passage for file in group for passage in file.passages]
    vectors = store.encoder.encode([passage.page_content for passage in passages])
    with store.table.database.writing() as db:
        for file in group:
            report.passages_removed += _remove_passages(store, db, file.path, collection)
            db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (collection, file.path, file.sha256))
        if passages:
            store.add_vectors(passages, vectors)
    report.passages_added += len(passages)
    report.changed += sum(file.path in known for file in group)
    report.new += sum(file.path not in known for file in group)


def _forget(store: PassageStore, paths: list[str], collection: str, report: IndexingReport) -> None:
    if not paths:
        return
    with store.table.database.writing() as db:
        for path in paths:
            report.passages_removed += _remove_passages(store, db, path, collection)
            db.execute("DELETE FROM files WHERE collection = ? AND path = ?", (collection, path))
    report.deleted += len(paths)


def _remove_passages(store: PassageStore, db: sqlite3.Connection, path: str, collection: str) -> int:
    rows = db.execute(
        "SELECT id FROM passages WHERE json_extract(metadata, '$.source') = ? "
        "AND json_extract(metadata, '$.collection') = ?",
        (path, collection),
    ).fetchall()
    return store.table.remove([row[0] for row in rows]) if rows else 0


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
