"""Passages by their words: BM25 (Robertson and Zaragoza 2009) as bm25s computes it, with Lucene's idf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esper.cortex.extra import missing_extra
from esper.cortex.retrieval.passages import PassageTable
from esper.cortex.retrieval.snapshots import read_snapshot, write_snapshot
from esper.cortex.words import split_words

try:
    import bm25s
except ImportError as error:
    raise missing_extra("retrieval", "bm25s") from error

__all__ = ["SparseIndex"]

_ROWS = "rows.npy"
_READ_ROWS = 5000


class SparseIndex:
    """Words of a table's passages, in memory.

    A word's weight depends on all passages, so any change makes the index anew, before the next search.

    Args:
        table: Whose passages.
    """

    def __init__(self, table: PassageTable) -> None:
        self._table = table
        self._bm25: Any = None
        self._rows = np.empty(0, dtype=np.int64)
        self._change = -1

    def search(
        self, question: str, k: int, allowed: np.ndarray[Any, np.dtype[np.int64]] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to ``k`` (row, score), best first: passages that share a word with the question.

        Args:
            question: In words.
            k: How many.
            allowed: Rows to search among, sorted; None for all.
        """
        self.update()
        if self._bm25 is None:
            return []
        known = [
            self._bm25.vocab_dict[w] for w in dict.fromkeys(_tokens(question)) if w in self._bm25.vocab_dict
        ]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        if allowed is not None:
            scores = np.where(np.isin(self._rows, allowed), scores, 0.0)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > k:
            hits = hits[np.argpartition(-scores[hits], k - 1)[:k]]
        # Equal scores stand in the order of their rows, so that a search repeats itself.
        order = np.lexsort((self._rows[hits], -scores[hits]))
        return [(int(self._rows[i]), float(scores[i])) for i in hits[order]]

    def update(self) -> None:
        """Make the index anew if the table has changed."""
        with self._table.database.reading():
            if self._change < 0:
                self._load()
            changes = self._table.changes(max(self._change, 0))
            if changes.change == self._change:
                return
            rows = self._table.changes(0).added
            vocabulary: dict[str, int] = {}
            tokens: list[list[int]] = []
            for start in range(0, len(rows), _READ_ROWS):
                part = rows[start : start + _READ_ROWS].tolist()
                texts = self._table.texts(part)
                for row in part:
                    tokens.append(
                        [vocabulary.setdefault(word, len(vocabulary)) for word in _tokens(texts[row])]
                    )
        self._rows, self._change, self._bm25 = rows, changes.change, None
        if vocabulary:
            self._bm25 = bm25s.BM25(method="lucene")
            self._bm25.index((tokens, vocabulary), show_progress=False)

    def save(self) -> None:
        """Write the index beside the table."""
        self.update()
        if self._bm25 is not None:
            write_snapshot(self._table, "sparse", self._change, self._write)

    def _write(self, folder: Path) -> None:
        self._bm25.save(folder, show_progress=False)
        np.save(folder / _ROWS, self._rows, allow_pickle=False)

    def _load(self) -> None:
        found = read_snapshot(self._table, "sparse", _read)
        if found is not None:
            self._change, (self._bm25, self._rows) = found


def _read(folder: Path) -> tuple[Any, np.ndarray[Any, np.dtype[np.int64]]]:
    rows = np.load(folder / _ROWS, allow_pickle=False)
    return bm25s.BM25.load(folder, load_corpus=False, show_progress=False), rows


def _tokens(text: str) -> list[str]:
    parts, wholes = split_words(text)
    return parts + wholes
