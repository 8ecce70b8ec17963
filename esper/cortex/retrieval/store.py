"""LangChain's ``VectorStore`` over faiss and SQLite, without a pickle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from esper.cortex.encoder import Encoder, build_encoder, describe_encoder, unit_vectors
from esper.cortex.encoder.base import Vectors
from esper.cortex.retrieval.dense import DenseIndex
from esper.cortex.retrieval.filters import Filter
from esper.cortex.retrieval.passages import Origin, PassageTable
from esper.cortex.retrieval.sparse import SparseIndex
from esper.errors import ConfigError, DataFormatError, DataNotFoundError

__all__ = ["PassageStore"]


class PassageStore(VectorStore):
    """Documents with their vectors in a folder.

    Several processes may use one folder: writers wait for each other, readers see every finished change with their
    next search. :meth:`save` writes the indexes beside the documents, which saves the next process making them.

    Args:
        folder: Made when it is not there.
        encoder: Of documents and questions.

    Raises:
        DataFormatError: Another encoder made the store, or it is damaged.
    """

    def __init__(self, folder: str | Path, encoder: Encoder) -> None:
        self.encoder = encoder
        self.table = PassageTable(Path(folder))
        mine = Origin(encoder.fingerprint, encoder.dimension, describe_encoder(encoder))
        self.table.set_origin(mine)
        made = self.table.origin()
        if made is None or (made.fingerprint, made.dimension) != (mine.fingerprint, mine.dimension):
            self.table.database.close()
            raise DataFormatError(
                f"expected the store {folder} to be made by {mine.fingerprint}, but "
                f"{made.fingerprint if made else 'nobody'} made it; use that encoder or another folder"
            )
        self.dense = DenseIndex(self.table, encoder.dimension)
        self.sparse = SparseIndex(self.table)

    @classmethod
    def open(cls, folder: str | Path) -> PassageStore:
        """Open a store that is there with the encoder that made it.

        Raises:
            DataNotFoundError: There is none.
            ConfigError: A class of someone's own made it; give it to the constructor.
        """
        try:
            table = PassageTable(Path(folder), readonly=True)
        except DataNotFoundError as error:
            raise DataNotFoundError(
                f"expected a store in {folder}, and there is none; make one: esper index PATH --store {folder}"
            ) from error
        try:
            origin = table.origin()
        finally:
            table.database.close()
        if origin is None or origin.encoder is None:
            raise ConfigError(
                f"the store {folder} does not name its encoder; open it with PassageStore(folder, encoder)"
            )
        return cls(folder, build_encoder(*origin.encoder))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        folder: str | Path = "",
        **kwargs: Any,
    ) -> PassageStore:
        """Make a store in ``folder`` and add ``texts``.

        Raises:
            ConfigError: No folder, or an embedding that is no :class:`~esper.cortex.encoder.Encoder`.
        """
        if not folder:
            raise ConfigError("PassageStore.from_texts needs folder=, where the store is kept")
        if not isinstance(embedding, Encoder):
            raise ConfigError(
                f"expected an Encoder of esper, got {type(embedding).__name__}; build_encoder('module:Class') wraps it"
            )
        store = cls(folder, embedding)
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    @property
    def embeddings(self) -> Embeddings:
        """The encoder."""
        return self.encoder

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents, all or none; one whose id is there takes its place.

        Args:
            documents: To add; metadata is what JSON can hold.
            kwargs: ``ids``: of the documents, instead of their own.

        Returns:
            Their ids.

        Raises:
            DataFormatError: A blank text.
            ConfigError: Metadata that JSON cannot hold, an id twice, or another number of ids than of documents.
        """
        ids = kwargs.pop("ids", None)
        if kwargs:
            raise ConfigError(f"PassageStore.add_documents takes ids, got also {sorted(kwargs)}")
        if ids is not None:
            if len(ids) != len(documents):
                raise ConfigError(f"expected an id for each of {len(documents)} documents, got {len(ids)}")
            documents = [d.model_copy(update={"id": i}) for d, i in zip(documents, ids, strict=True)]
        return self.add_vectors(documents, self.encoder.encode([d.page_content for d in documents]))

    def add_vectors(self, documents: Sequence[Document], vectors: Any) -> list[str]:
        """Add documents whose vectors (n, D) are known; they are brought to length one.

        Raises:
            DataFormatError: Another shape, NaN, or a vector of zeros.
            ConfigError: See :meth:`add_documents`.
        """
        if not documents:
            return []
        checked = unit_vectors(vectors, self.encoder.dimension, "the documents' vectors")
        if len(checked) != len(documents):
            raise DataFormatError(
                f"expected a vector for each of {len(documents)} documents, got {len(checked)}"
            )
        return self.table.add(documents, checked)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents by id; all of them without ``ids``. Returns whether all of them were there."""
        wanted = self.table.ids() if ids is None else list(dict.fromkeys(ids))
        return self.table.remove(wanted) == len(wanted)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents of those of ``ids`` that are there."""
        return self.table.by_ids(ids)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """As :meth:`similarity_search_with_score`, without the scores."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:
        """Return the ``k`` documents nearest to ``query`` with their cosines, best first.

        Args:
            query: A text.
            k: How many.
            filter: On the metadata; see :data:`~esper.cortex.retrieval.filters.Filter`.

        Raises:
            DataFormatError: A blank text.
            ConfigError: ``k`` below 1, or a filter that no document can meet.
        """
        return self._nearest(np.asarray(self.encoder.embed_query(query), dtype=np.float32), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """Return the ``k`` documents nearest to a vector (D,).

        Raises:
            DataFormatError: Another dimension, NaN, or all zeros.
        """
        vector = unit_vectors([embedding], self.encoder.dimension, "the question's vector")[0]
        return [document for document, _ in self._nearest(vector, k, filter)]

    def save(self) -> None:
        """Write the indexes beside the documents."""
        self.dense.save()
        self.sparse.save()

    def close(self) -> None:
        """Close the files."""
        self.table.database.close()

    def __len__(self) -> int:
        return self.table.count()

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _nearest(self, vector: Vectors, k: int, filter: Filter | None) -> list[tuple[Document, float]]:
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        with self.table.database.reading():
            allowed = self.table.rows(filter) if filter else None
            hits = self.dense.search(vector, k, allowed)
            documents = self.table.documents([row for row, _ in hits])
        return [(documents[row], score) for row, score in hits]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, (1.0 + cosine) / 2.0))
