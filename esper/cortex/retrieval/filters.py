"""Conditions on the metadata of passages, as SQL."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from esper.errors import ConfigError

__all__ = ["Filter", "check_filter", "where"]

Filter = Mapping[str, Any]
"""Key -> value, or a list of values of which one has to fit. All keys have to fit. A text may hold ``*`` and ``?``
as file names do, where ``*`` stands for slashes too."""

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_filter(db: sqlite3.Connection, conditions: Filter) -> None:
    """Refuse conditions that no passage could ever meet.

    Raises:
        ConfigError: A key that is no name, or that no passage has; a value that is no text, number or truth value.
    """
    for key, value in conditions.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ConfigError(f"a filter's key must be a name of letters, digits and _, got {key!r}")
        for one in _values(value):
            if not isinstance(one, (str, int, float)):
                raise ConfigError(
                    f"the filter {key} must be a text or a number, or a list of them, got {value!r}"
                )
        if not db.execute(f"SELECT 1 FROM passages WHERE {_field(key)} IS NOT NULL LIMIT 1").fetchone():
            known = db.execute(
                "SELECT DISTINCT key FROM (SELECT metadata FROM passages LIMIT 1000), json_each(metadata)"
            ).fetchall()
            raise ConfigError(
                f"no passage of this store has {key!r} to filter by; there are: "
                f"{', '.join(sorted(row[0] for row in known)) or 'no passages'}"
            )


def where(conditions: Filter) -> tuple[str, list[Any]]:
    """Return an SQL condition over the table of passages, and its parameters."""
    clauses, parameters = [], []
    for key, value in conditions.items():
        any_of = []
        for one in _values(value):
            pattern = isinstance(one, str) and ("*" in one or "?" in one)
            any_of.append(f"{_field(key)} {'GLOB' if pattern else '='} ?")
            parameters.append(one.replace("[", "[[]") if pattern else one)
        clauses.append(f"({' OR '.join(any_of) or '0'})")
    return " AND ".join(clauses) or "1", parameters


def _field(key: str) -> str:
    return f"json_extract(metadata, '$.{key}')"


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
