"""Indexes on the disk beside the table they are made from.

A snapshot is a folder that appears under its name in one move and is then written into the table with its
SHA-256. What a kill leaves is at worst a folder that nobody knows, which the next writing removes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from esper.cortex.retrieval.passages import PassageTable

__all__ = ["read_snapshot", "write_snapshot"]

_log = logging.getLogger(__name__)

_Index = TypeVar("_Index")


def write_snapshot(table: PassageTable, kind: str, change: int, fill: Callable[[Path], None]) -> None:
    """Keep an index as of ``change``.

    Args:
        table: What it was made from.
        kind: ``dense`` or ``sparse``.
        change: Number of the last change that is in it.
        fill: Writes its files into the folder it is given.
    """
    name = f"{kind}-{change}"
    temporary, final = table.folder / f".{name}.tmp", table.folder / name
    # Within a transaction, so that two processes do not write one folder.
    with table.database.writing() as db:
        known = db.execute(
            "SELECT folder, sha256 FROM snapshots WHERE kind = ? AND change >= ?", (kind, change)
        ).fetchone()
        if known is not None and _is_whole(table.folder / known[0], known[1]):
            return
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, final)
        db.execute(
            "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", (kind, name, _digest(final), change)
        )
    # After the commit: a kill before it must find the old snapshot. Again within a transaction, in which no other
    # process is writing one.
    with table.database.writing() as db:
        current = db.execute("SELECT folder FROM snapshots WHERE kind = ?", (kind,)).fetchone()[0]
        for path in [*table.folder.glob(f"{kind}-*"), *table.folder.glob(f".{kind}-*.tmp")]:
            if path.name != current:
                shutil.rmtree(path, ignore_errors=True)


def read_snapshot(
    table: PassageTable, kind: str, load: Callable[[Path], _Index]
) -> tuple[int, _Index] | None:
    """Return the change that the last snapshot is as of, and what ``load`` reads from its folder.

    None if there is none that is whole, or another process is just replacing it.
    """
    with table.database.reading() as db:
        row = db.execute("SELECT folder, sha256, change FROM snapshots WHERE kind = ?", (kind,)).fetchone()
    if row is None:
        return None
    folder = table.folder / Path(row[0]).name
    try:
        if _digest(folder) == row[1]:
            return int(row[2]), load(folder)
        reason = "damaged"
    except (OSError, RuntimeError, ValueError) as error:  # faiss raises RuntimeError for files it cannot open
        reason = f"not readable ({error})"
    _log.warning("the %s index in %s is %s; it is made anew from the passages", kind, table.folder, reason)
    return None


def _is_whole(folder: Path, sha256: str) -> bool:
    return folder.is_dir() and _digest(folder) == sha256


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
