"""SQLite files of Cortex: opened with care, one transaction at a time, errors in this package's words."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.errors import DataFormatError, DataNotFoundError, StoreError

__all__ = ["Database"]

_BUSY_TIMEOUT_S = 30.0


class Database:
    """A connection to one SQLite file, for all threads of a process.

    It is in write-ahead mode: readers go on while another process writes, and a process that is killed leaves
    what it had committed.

    Args:
        path: The file; made, with its folder, when it is not there.
        kind: Number that marks files of this kind (SQLite's application id).
        version: Of the schema.
        schema: Statements that make the tables of a new file.
        readonly: The file has to be there.

    Raises:
        DataNotFoundError: ``readonly``, and nothing is there.
        DataFormatError: The file is of another kind or version, or damaged.
        StoreError: It cannot be opened.
    """

    def __init__(self, path: Path, *, kind: int, version: int, schema: str, readonly: bool = False) -> None:
        if readonly and not path.is_file():
            raise DataNotFoundError(f"expected a file at {path}, and there is none")
        self.path = path
        self._lock = threading.RLock()
        with self._told():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot make the folder {path.parent}: {error}") from error
            self._db = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(kind, version, schema)
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """All queries of the block see one state of the file."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: in the file when the block has ended well, undone when it has not."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._told():
            if self._db.in_transaction:  # a block within a block is part of the outer one
                yield self._db
                return
            self._db.execute(begin)
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _prepare(self, kind: int, version: int, schema: str) -> None:
        self._write_ahead()
        self._db.execute("PRAGMA synchronous=NORMAL")
        with self._transaction("BEGIN IMMEDIATE") as db:
            found = db.execute("PRAGMA application_id").fetchone()[0]
            if found == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in filter(str.strip, schema.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={kind}")
                db.execute(f"PRAGMA user_version={version}")
                return
        if found != kind:
            raise DataFormatError(f"{self.path} is an SQLite file of another kind; give another path")
        if (got := self._db.execute("PRAGMA user_version").fetchone()[0]) != version:
            raise DataFormatError(
                f"expected version {version} of {self.path}, got {got}; another version of esper made it: make it anew"
            )

    def _write_ahead(self) -> None:
        # Where several processes open a new file at once, SQLite refuses this without waiting.
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path} cannot be used now: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DataFormatError(
                f"{self.path} is damaged or no SQLite file ({error}); delete it and make it anew"
            ) from error
