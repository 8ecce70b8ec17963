"""Questions to a store: by vectors, by words, or by both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from esper.cortex.retrieval.filters import Filter
from esper.cortex.retrieval.fusion import reciprocal_rank_fusion
from esper.cortex.retrieval.store import PassageStore
from esper.errors import ConfigError, DataFormatError

__all__ = ["MAX_QUESTION_CHARS", "Hit", "HybridRetriever", "Mode", "search_passages"]

Mode = Literal["hybrid", "dense", "sparse"]

MAX_QUESTION_CHARS = 20_000
"""A longer question is a document, and should be split."""

_DEPTH = 100
# The paper's 60 is for many systems over pools of relevant pages. Where one passage is the right one, first ranks
# should count for more: 10 was better with every setting of the hashing encoder that was tried over scikit-learn
# and networkx (not in the benchmark's default libraries).
_CONSTANT = 10.0


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        document: The passage; its metadata says from where.
        score: What it was ranked by: fused ranks (hybrid), cosine (dense) or BM25 (sparse).
        cosine: Where it was among the nearest by vectors.
        bm25: Where it was among the best by words.
    """

    document: Document
    score: float
    cosine: float | None
    bm25: float | None


def search_passages(
    store: PassageStore,
    question: str,
    k: int = 5,
    *,
    mode: Mode = "hybrid",
    filter: Filter | None = None,
) -> list[Hit]:
    """Return up to ``k`` passages, best first; the same ones for the same question and store.

    ``hybrid`` fuses the best hundred (or ``k``) of either search by their ranks.

    Raises:
        DataFormatError: A question that is blank or too long.
        ConfigError: ``k`` below 1, an unknown mode, or a filter that no passage can meet.
    """
    if not question.strip():
        raise DataFormatError("expected a question, got a blank one")
    if len(question) > MAX_QUESTION_CHARS:
        raise DataFormatError(
            f"expected a question of at most {MAX_QUESTION_CHARS:,} characters, got {len(question):,}; shorten it"
        )
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}")
    if mode not in get_args(Mode):
        raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    depth = max(k, _DEPTH) if mode == "hybrid" else k
    vector = None
    if mode != "sparse":
        vector = np.asarray(store.encoder.embed_query(question), dtype=np.float32)
    # One reading: both searches and the documents are of one state of the store.
    with store.table.database.reading():
        allowed = store.table.rows(filter) if filter else None
        dense = {} if vector is None else dict(store.dense.search(vector, depth, allowed))
        sparse = {} if mode == "dense" else dict(store.sparse.search(question, depth, allowed))
        if mode == "hybrid":
            ranked = reciprocal_rank_fusion([list(dense), list(sparse)], constant=_CONSTANT)[:k]
        else:
            ranked = list((dense or sparse).items())
        documents = store.table.documents([row for row, _ in ranked])
    return [Hit(documents[row], score, dense.get(row), sparse.get(row)) for row, score in ranked]


class HybridRetriever(BaseRetriever):
    """LangChain's retriever over :func:`search_passages`; each document's metadata gets its ``score``.

    Attributes:
        store: To search.
        k: Passages to return.
        mode: ``hybrid``, ``dense`` or ``sparse``.
        filter: On the metadata.
    """

    store: PassageStore
    k: int = 5
    mode: Mode = "hybrid"
    filter: dict[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        hits = search_passages(self.store, query, self.k, mode=self.mode, filter=self.filter)
        return [
            hit.document.model_copy(update={"metadata": {**hit.document.metadata, "score": hit.score}})
            for hit in hits
        ]
