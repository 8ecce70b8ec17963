"""The table under a store: passages, their vectors, and what has changed since when.

It is the only truth. The indexes beside it are made from it, and made anew when they are missing, damaged or old.
Every change has a number; a row is never used again, so whoever knows the last number it saw can catch up.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esper.cortex.database import Database
from esper.cortex.encoder.base import Vectors
from esper.cortex.extra import missing_extra
from esper.cortex.retrieval.filters import Filter, check_filter, where
from esper.errors import ConfigError, DataFormatError

try:
    from langchain_core.documents import Document
except ImportError as error:
    raise missing_extra("retrieval", "langchain-core") from error

__all__ = ["Changes", "Origin", "PassageTable"]

_KIND = 0x45535052  # "ESPR"
_VERSION = 1
_SCHEMA = """
CREATE TABLE origin (fingerprint TEXT NOT NULL, dimension INTEGER NOT NULL, encoder TEXT);
CREATE TABLE state (change INTEGER NOT NULL);
INSERT INTO state VALUES (0);
CREATE TABLE passages (
    row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, change INTEGER NOT NULL,
    metadata TEXT NOT NULL, text TEXT NOT NULL
);
CREATE INDEX passages_change ON passages (change);
CREATE INDEX passages_collection ON passages (json_extract(metadata, '$.collection'));
CREATE INDEX passages_source ON passages (json_extract(metadata, '$.source'));
CREATE TABLE vectors (row INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE removed (row INTEGER PRIMARY KEY, change INTEGER NOT NULL);
CREATE INDEX removed_change ON removed (change);
CREATE TABLE files (
    collection TEXT NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (collection, path)
);
CREATE TABLE snapshots (kind TEXT PRIMARY KEY, folder TEXT NOT NULL, sha256 TEXT NOT NULL, change INTEGER NOT NULL)
"""
_FILE = "passages.sqlite"
_VARIABLES = 500


@dataclass(frozen=True)
class Origin:
    """Whose vectors a store holds: fingerprint, D, and name and settings where the encoder has them."""

    fingerprint: str
    dimension: int
    encoder: tuple[str, dict[str, Any]] | None


@dataclass(frozen=True)
class Changes:
    """What an index that saw change ``since`` has to do to be as of ``change``.

    Attributes:
        change: Number of the last change.
        removed: Rows that are gone.
        added: Rows that are new.
    """

    change: int
    removed: np.ndarray[Any, np.dtype[np.int64]]
    added: np.ndarray[Any, np.dtype[np.int64]]


class PassageTable:
    """See the module.

    Args:
        folder: Of the store; made when it is not there.
        readonly: The store has to be there.

    Raises:
        DataNotFoundError: ``readonly``, and there is no store.
        DataFormatError: The file is another's, or damaged.
    """

    def __init__(self, folder: Path, *, readonly: bool = False) -> None:
        self.folder = folder
        self.database = Database(
            folder / _FILE, kind=_KIND, version=_VERSION, schema=_SCHEMA, readonly=readonly
        )

    def origin(self) -> Origin | None:
        """Whose vectors these are; None in a new store."""
        with self.database.reading() as db:
            row = db.execute("SELECT fingerprint, dimension, encoder FROM origin").fetchone()
        if row is None:
            return None
        try:
            encoder = json.loads(row[2]) if row[2] else None
            if encoder is not None:
                encoder = (str(encoder[0]), dict(encoder[1]))
        except (TypeError, ValueError, LookupError) as error:
            raise DataFormatError(f"{self.database.path} does not say which encoder made it") from error
        return Origin(row[0], row[1], encoder)

    def set_origin(self, origin: Origin) -> None:
        """Say whose vectors a new store will hold."""
        encoder = json.dumps(origin.encoder) if origin.encoder else None
        with self.database.writing() as db:
            if not db.execute("SELECT 1 FROM origin").fetchone():
                db.execute(
                    "INSERT INTO origin VALUES (?, ?, ?)", (origin.fingerprint, origin.dimension, encoder)
                )

    def add(self, documents: Sequence[Document], vectors: Vectors) -> list[str]:
        """Add documents with their vectors (n, D); one whose id is there takes its place.

        Raises:
            ConfigError: Metadata that JSON cannot hold, or an id twice.
        """
        ids = [document.id or uuid.uuid4().hex for document in documents]
        if len(set(ids)) != len(ids):
            raise ConfigError("expected documents with ids of their own, but one id occurs twice in one call")
        try:
            metadata = [json.dumps(document.metadata, allow_nan=False) for document in documents]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"expected metadata that JSON can hold: {error}") from error
        with self.database.writing() as db:
            change = _next_change(db)
            _remove(db, ids, change)
            for id_, meta, document, vector in zip(ids, metadata, documents, vectors, strict=True):
                row = db.execute(
                    "INSERT INTO passages (id, change, metadata, text) VALUES (?, ?, ?, ?)",
                    (id_, change, meta, _storable(document.page_content)),
                ).lastrowid
                db.execute("INSERT INTO vectors VALUES (?, ?)", (row, vector.astype("<f4").tobytes()))
        return ids

    def remove(self, ids: Sequence[str]) -> int:
        """Remove passages by id; ids that are not there are passed over. Returns how many were there."""
        with self.database.writing() as db:
            return _remove(db, ids, _next_change(db))

    def changes(self, since: int) -> Changes:
        """What has changed after change number ``since`` (0: everything)."""
        with self.database.reading() as db:
            change = db.execute("SELECT change FROM state").fetchone()[0]
            rows = [
                db.execute(f"SELECT row FROM {table} WHERE change > ? ORDER BY row", (since,)).fetchall()
                for table in ("removed", "passages")
            ]
        removed, added = (np.array([row[0] for row in found], dtype=np.int64) for found in rows)
        return Changes(change, removed, added)

    def vectors(self, rows: Sequence[int], dimension: int) -> Vectors:
        """Return the vectors of ``rows`` (n, D).

        Raises:
            DataFormatError: One is missing, or not of D numbers and length one.
        """
        blobs = self._columns("vectors", "vector", rows)
        if len(blobs) != len(rows) or any(len(blob) != 4 * dimension for blob in blobs.values()):
            raise DataFormatError(
                f"{self.database.path} lacks vectors, or has some of another length: {_ANEW}"
            )
        found = np.frombuffer(b"".join(blobs[row] for row in rows), dtype="<f4").reshape(len(rows), dimension)
        if not (np.abs(np.linalg.norm(found, axis=1) - 1.0) < 5e-3).all():
            raise DataFormatError(f"{self.database.path} holds vectors that are not of length one: {_ANEW}")
        return found.astype(np.float32)

    def texts(self, rows: Sequence[int]) -> dict[int, str]:
        """Return the texts of those of ``rows`` that are there."""
        return self._columns("passages", "text", rows)

    def documents(self, rows: Sequence[int]) -> dict[int, Document]:
        """Return the documents of those of ``rows`` that are there."""
        return {row: document for row, document in self._documents("row", rows)}

    def by_ids(self, ids: Sequence[str]) -> list[Document]:
        """Return the documents of those of ``ids`` that are there, in their order."""
        found = {document.id: document for _, document in self._documents("id", ids)}
        return [found[id_] for id_ in ids if id_ in found]

    def ids(self, conditions: Filter | None = None) -> list[str]:
        """Return the ids of all passages, or of those that meet ``conditions``."""
        return [row[0] for row in self._select("id", conditions or {})]

    def rows(self, conditions: Filter) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows that meet ``conditions``, sorted.

        Raises:
            ConfigError: See :func:`~esper.cortex.retrieval.filters.check_filter`.
        """
        with self.database.reading() as db:
            check_filter(db, conditions)
            return np.array([row[0] for row in self._select("row", conditions)], dtype=np.int64)

    def count(self) -> int:
        """Number of passages."""
        with self.database.reading() as db:
            return int(db.execute("SELECT count(*) FROM passages").fetchone()[0])

    def _select(self, column: str, conditions: Filter) -> list[tuple[Any]]:
        clause, parameters = where(conditions)
        with self.database.reading() as db:
            return db.execute(
                f"SELECT {column} FROM passages WHERE {clause} ORDER BY row", parameters
            ).fetchall()

    def _columns(self, table: str, column: str, rows: Sequence[int]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        with self.database.reading() as db:
            for part in _parts(rows):
                marks = ",".join("?" * len(part))
                found.update(
                    db.execute(f"SELECT row, {column} FROM {table} WHERE row IN ({marks})", part).fetchall()
                )
        return found

    def _documents(self, key: str, values: Sequence[Any]) -> list[tuple[int, Document]]:
        found = []
        with self.database.reading() as db:
            for part in _parts(values):
                marks = ",".join("?" * len(part))
                query = f"SELECT row, id, metadata, text FROM passages WHERE {key} IN ({marks})"
                for row, id_, metadata, text in db.execute(query, part):
                    found.append(
                        (row, Document(id=id_, page_content=text, metadata=self._metadata(metadata)))
                    )
        return found

    def _metadata(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DataFormatError(f"{self.database.path} holds metadata that is no JSON: {_ANEW}") from error
        if not isinstance(found, dict):
            raise DataFormatError(f"{self.database.path} holds metadata that is no object: {_ANEW}")
        return found


_ANEW = "the store is damaged; delete it and index again"


def _next_change(db: sqlite3.Connection) -> int:
    db.execute("UPDATE state SET change = change + 1")
    return int(db.execute("SELECT change FROM state").fetchone()[0])


def _remove(db: sqlite3.Connection, ids: Iterable[str], change: int) -> int:
    count = 0
    for id_ in ids:
        row = db.execute("SELECT row FROM passages WHERE id = ?", (id_,)).fetchone()
        if row is None:
            continue
        db.execute("INSERT INTO removed VALUES (?, ?)", (row[0], change))
        db.execute("DELETE FROM vectors WHERE row = ?", row)
        db.execute("DELETE FROM passages WHERE row = ?", row)
        count += 1
    return count


def _parts(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[start : start + _VARIABLES] for start in range(0, len(values), _VARIABLES)]


def _storable(text: str) -> str:
    # Half a surrogate pair is a str in Python and no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
