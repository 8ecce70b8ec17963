"""The tables of an experience store, and how an older file becomes a newer one.

The schema is a list of steps, and a file's ``user_version`` the number of those that it has been through. A new
version appends a step; a file of an older version goes through those it lacks, in one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from esper.errors import DataFormatError

__all__ = ["APPLICATION_ID", "STEPS", "check_kind", "migrate"]

APPLICATION_ID = 0x45737072
"""``Espr``, in the file's header: what tells a store from any other SQLite file."""

STEPS: tuple[str, ...] = (
    """
    CREATE TABLE runs (
        run_id  TEXT PRIMARY KEY,
        started REAL NOT NULL,              -- Unix seconds
        ended   INTEGER                     -- optimizer steps at the end; NULL while it goes on, or was killed
    ) WITHOUT ROWID;
    CREATE TABLE parts (                    -- of decision points: topologies, and signals of one sampled step
        digest BLOB PRIMARY KEY,            -- BLAKE2b, 16 bytes, of the msgpack
        facts  BLOB NOT NULL
    );
    CREATE TABLE decisions (
        number        INTEGER PRIMARY KEY AUTOINCREMENT,
        decision_id   TEXT NOT NULL UNIQUE,
        run_id        TEXT NOT NULL REFERENCES runs (run_id),
        step          INTEGER NOT NULL,
        policy        TEXT NOT NULL,
        version       TEXT NOT NULL,
        action        TEXT NOT NULL,        -- of the chosen candidate
        chosen        INTEGER NOT NULL,
        logprob       REAL NOT NULL,
        confidence    REAL NOT NULL,
        uncertainty   REAL,
        facts_version INTEGER NOT NULL,     -- FACTS_VERSION of esper/tamiyo/graph/facts.py
        point         BLOB NOT NULL,
        seed_ids      TEXT NOT NULL DEFAULT '[]',
        refused       TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX decisions_by_run ON decisions (run_id, step);
    CREATE INDEX decisions_by_policy ON decisions (policy, version);
    CREATE TABLE outcomes (
        decision_id TEXT PRIMARY KEY REFERENCES decisions (decision_id) ON DELETE CASCADE,
        provenance  TEXT NOT NULL,          -- itself, control, fitted ± se, none
        final       INTEGER NOT NULL,
        total       REAL,                   -- NULL without a reward
        utility     REAL,
        facts       BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE observations (
        run_id TEXT NOT NULL REFERENCES runs (run_id),
        step   INTEGER NOT NULL,
        facts  BLOB NOT NULL,
        PRIMARY KEY (run_id, step)
    ) WITHOUT ROWID;
    CREATE TABLE incidents (
        number INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs (run_id),
        step   INTEGER NOT NULL,
        facts  BLOB NOT NULL
    );
    CREATE INDEX incidents_by_run ON incidents (run_id, step);
    """,
)


def check_kind(connection: sqlite3.Connection, path: str, steps: Sequence[str] = STEPS) -> int:
    """Look at a file without changing a byte of it.

    Returns:
        How many of ``steps`` it has been through; 0 for an empty file.

    Raises:
        DataFormatError: It is no experience store, or one of a newer version.
    """
    try:
        kind = int(connection.execute("PRAGMA application_id").fetchone()[0])
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # locked, or not to be opened: nothing is known of what it holds
        raise DataFormatError(
            f"{path}: expected an experience store, got a file that SQLite cannot read: {error}; restore it from a "
            "copy, or move it away"
        ) from error
    if kind == 0 and version == 0 and not tables:
        return 0
    if kind != APPLICATION_ID:
        raise DataFormatError(
            f"{path}: expected an experience store, got another program's database (tables "
            f"{', '.join(sorted(tables)[:5]) or 'none'}); give another path"
        )
    if version > len(steps):
        raise DataFormatError(
            f"{path}: expected an experience store of version {len(steps)} at most, got version {version}; a newer "
            "esper has written it, so read it with that one"
        )
    return version


def migrate(connection: sqlite3.Connection, path: str, steps: Sequence[str] = STEPS) -> None:
    """Bring a store to the version of ``steps``, wholly or not at all.

    Args:
        connection: In autocommit mode, with no transaction begun.
        path: For errors.
        steps: Statements of each version.

    Raises:
        DataFormatError: As :func:`check_kind`.
    """
    if check_kind(connection, path, steps) == len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # once more, as another process may have been at it since
        for step in steps[check_kind(connection, path, steps) :]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _statements(step: str) -> list[str]:
    """Single statements: ``executescript`` would commit what is under way."""
    found, rest = [], ""
    for line in step.splitlines():
        rest += line + "\n"
        if sqlite3.complete_statement(rest):
            found.append(rest)
            rest = ""
    assert not rest.strip(), rest
    return found
