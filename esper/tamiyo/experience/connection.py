"""The file under an experience store: opened with care, one transaction at a time, errors in this package's words."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.errors import ConfigError, DataFormatError, DataNotFoundError, StoreError
from esper.tamiyo.experience.schema import STEPS, check_kind, migrate

__all__ = ["StoreFile"]


class StoreFile:
    """A connection to one SQLite file, for the threads of one process; opened on first use, and anew after a fork.

    Args:
        path: The file; made, with its folder, when it is not there.
        readonly: Look, and change nothing; the file has to be there, and of this version.
        busy_timeout_s: How long to wait for another writer.

    Raises:
        ConfigError: No time to wait.
        DataNotFoundError: ``readonly``, and nothing is there.
    """

    def __init__(self, path: Path, *, readonly: bool, busy_timeout_s: float) -> None:
        if not busy_timeout_s > 0:
            raise ConfigError(f"ExperienceStore: busy_timeout_s should be positive, got {busy_timeout_s}")
        if readonly and not path.is_file():
            raise DataNotFoundError(f"expected an experience store at {path}, and there is no such file")
        self.path = path
        self.readonly = readonly
        self.closed = False
        self._timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._inherited: list[sqlite3.Connection] = []

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for queries."""
        with self._lock, self._told():
            yield self._open()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when the block has ended well and undone when it has not."""
        if self.readonly:
            raise StoreError(
                f"{self.path} was opened for reading only; open it without readonly=True to write"
            )
        with self._lock, self._told():
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            self.closed = True
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
                self._connection = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in this package's words what SQLite has to say."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self.path}: the experience store could not be used: {error}; is the disk full, the folder "
                f"writable, or another process writing for more than {self._timeout_s:g} s?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataFormatError(f"{self.path}: the experience store is damaged: {error}") from error

    def _open(self) -> sqlite3.Connection:
        if self.closed:
            raise StoreError(
                f"{self.path}: the experience store is closed; make a new ExperienceStore to go on"
            )
        if self._connection is not None:
            if self._pid == os.getpid():
                return self._connection
            # Closing it here could take the log away from the process that opened it.
            self._inherited.append(self._connection)
            self._connection = None
        if not self.readonly:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        mode = "ro" if self.readonly else "rwc"
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=self._timeout_s,
            isolation_level=None,
            check_same_thread=False,  # every use holds the lock
        )
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._connection, self._pid = db, os.getpid()
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = check_kind(db, str(self.path))  # before the first byte is changed
        db.execute("PRAGMA foreign_keys = ON")
        if self.readonly:
            if version == 0:
                raise DataFormatError(f"{self.path}: expected an experience store, got an empty file")
            if version != len(STEPS):
                raise DataFormatError(
                    f"{self.path}: expected a store of version {len(STEPS)}, got version {version}; open it once for "
                    "writing, ExperienceStore(path), to bring it up to date"
                )
            return
        self._turn_to_log(db)
        db.execute("PRAGMA synchronous = FULL")
        migrate(db, str(self.path))

    def _turn_to_log(self, db: sqlite3.Connection) -> None:
        """Write ahead; turning to it needs the file for a moment alone, for which SQLite itself does not wait."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
