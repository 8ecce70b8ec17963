"""Passages by their vectors: exact inner product by faiss, the cosine of vectors of length one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esper.cortex.encoder.base import Vectors
from esper.cortex.extra import missing_extra
from esper.cortex.retrieval.passages import PassageTable
from esper.cortex.retrieval.snapshots import read_snapshot, write_snapshot

try:
    import faiss
except ImportError as error:
    raise missing_extra("retrieval", "faiss-cpu") from error

__all__ = ["DenseIndex"]

_FILE = "index.faiss"
_ADD_ROWS = 20_000  # read from the table at once


class DenseIndex:
    """Vectors of a table, in memory; brought up to date before every search.

    Args:
        table: Whose passages.
        dimension: D.
    """

    def __init__(self, table: PassageTable, dimension: int) -> None:
        self._table, self._dimension = table, dimension
        self._index: Any = None
        self._change = 0

    def search(
        self, vector: Vectors, k: int, allowed: np.ndarray[Any, np.dtype[np.int64]] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to ``k`` (row, cosine), best first.

        Args:
            vector: (D,), of length one.
            k: How many.
            allowed: Rows to search among; None for all.
        """
        self.update()
        k = min(k, self._index.ntotal if allowed is None else len(allowed))
        if k < 1:
            return []
        parameters: Any = None
        if allowed is not None:
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))  # type: ignore[call-arg]
        scores, rows = self._index.search(vector[None], k, params=parameters)
        found = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        return [(row, score) for row, score in found if row >= 0]

    def update(self) -> None:
        """Catch up with the table."""
        with self._table.database.reading():
            if self._index is None:
                self._load()
            changes = self._table.changes(self._change)
            if changes.change == self._change:
                return
            if len(changes.removed):
                self._index.remove_ids(changes.removed)
            for start in range(0, len(changes.added), _ADD_ROWS):
                rows = changes.added[start : start + _ADD_ROWS]
                self._index.add_with_ids(self._table.vectors(rows.tolist(), self._dimension), rows)
            self._change = changes.change
            # After a snapshot of another table under the same name, or an error of this module.
            if self._index.ntotal != self._table.count():
                self._index, self._change = self._empty(), 0
                self.update()

    def save(self) -> None:
        """Write the index beside the table."""
        self.update()
        write_snapshot(self._table, "dense", self._change, self._write)

    def _write(self, folder: Path) -> None:
        faiss.write_index(self._index, str(folder / _FILE))

    def _load(self) -> None:
        found = read_snapshot(self._table, "dense", lambda folder: faiss.read_index(str(folder / _FILE)))
        if found is not None:
            change, index = found
            if isinstance(index, faiss.IndexIDMap) and index.d == self._dimension:
                self._index, self._change = index, change
                return
        self._index, self._change = self._empty(), 0

    def _empty(self) -> Any:
        return faiss.IndexIDMap(faiss.IndexFlatIP(self._dimension))
