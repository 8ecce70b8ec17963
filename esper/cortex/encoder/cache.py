"""Vectors that were computed before, in an SQLite file.

A write is one transaction: a process that is killed leaves a file with every batch that it had finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from esper.cortex.database import Database
from esper.cortex.encoder.base import Encoder, Vectors, check_texts
from esper.errors import DataFormatError

__all__ = ["CachedEncoder"]

_KIND = 0x45535045  # "ESPE"
_VERSION = 1
_SCHEMA = """
CREATE TABLE origin (fingerprint TEXT NOT NULL);
CREATE TABLE vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID
"""
_VARIABLES = 500  # SQLite's limit on one statement was 999 for long


class CachedEncoder(Encoder):
    """An encoder that asks its file first. Each text is computed once, in this process or another.

    Args:
        encoder: Computes what the file does not have.
        path: The file; made when it is not there.

    Raises:
        DataFormatError: The file holds another encoder's vectors, or is damaged.
    """

    def __init__(self, encoder: Encoder, path: str | Path) -> None:
        self.encoder = encoder
        self._database = Database(Path(path), kind=_KIND, version=_VERSION, schema=_SCHEMA)
        with self._database.writing() as db:
            found = db.execute("SELECT fingerprint FROM origin").fetchone()
            if found is None:
                db.execute("INSERT INTO origin VALUES (?)", (self.fingerprint,))
        if found is not None and found[0] != self.fingerprint:
            self.close()
            raise DataFormatError(
                f"expected vectors of {self.fingerprint} in the cache {path}, but {found[0]} made them; give each "
                "encoder a file of its own"
            )

    @property
    def fingerprint(self) -> str:
        """Of the encoder: the cache changes no vector."""
        return self.encoder.fingerprint

    @property
    def dimension(self) -> int:
        """D."""
        return self.encoder.dimension

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See :meth:`Encoder.encode`."""
        check_texts(texts)
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        known = self._look_up(list(dict.fromkeys(keys)))
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            vectors = self.encoder.encode(list(new.values()))
            known.update(zip(new, vectors, strict=True))
            with self._database.writing() as db:
                db.executemany(
                    "INSERT OR IGNORE INTO vectors VALUES (?, ?)",
                    [(key, vector.astype("<f4").tobytes()) for key, vector in zip(new, vectors, strict=True)],
                )
        if not keys:
            return np.empty((0, self.dimension), dtype=np.float32)
        return np.stack([known[key] for key in keys])

    def __len__(self) -> int:
        with self._database.reading() as db:
            return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> CachedEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _look_up(self, keys: list[bytes]) -> dict[bytes, Vectors]:
        rows: list[tuple[bytes, bytes]] = []
        with self._database.reading() as db:
            for start in range(0, len(keys), _VARIABLES):
                part = keys[start : start + _VARIABLES]
                marks = ",".join("?" * len(part))
                rows += db.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part).fetchall()
        return {key: self._vector(blob) for key, blob in rows}

    def _vector(self, blob: bytes) -> Vectors:
        expected = 4 * self.dimension
        vector = np.frombuffer(blob, dtype="<f4") if len(blob) == expected else None
        # Half a per cent: rounding to float32 is far below, a flipped exponent bit far above.
        if vector is None or not abs(float(np.linalg.norm(vector)) - 1.0) < 5e-3:
            raise DataFormatError(
                f"expected vectors of {expected} bytes and of length one in {self._database.path}, but one is not; "
                "the file is damaged: delete it"
            )
        return vector.astype(np.float32)
