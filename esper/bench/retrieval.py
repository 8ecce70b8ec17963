"""From what a docstring says to its function, over the sources of installed libraries.

Each function is one passage, its docstring cut out; the question is the first paragraph of that docstring. All arms
search the same store: **bm25** by words, **dense** by the encoder's vectors, **hybrid** by both. MRR@10 is the mean of
one over the rank of the right function, zero beyond ten; names that a docstring repeats help every arm. Latency
is a whole hybrid search, the encoding of the question included.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from esper.bench._functions import read_functions, with_questions
from esper.errors import ConfigError

if TYPE_CHECKING:
    from esper.cortex.retrieval.search import Mode
    from esper.cortex.retrieval.store import PassageStore

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Retrieval: docstring to its function, MRR@10 by words, by vectors and by both; latency of a search"
TARGETS: dict[str, tuple[str, float]] = {"hybrid_gain": (">", 0.0), "p99_ms": ("<=", 50.0)}

_TOP = 10
_GROUP = 500
_RESAMPLES = 2000


def run(
    *,
    passages: int = 4000,
    questions: int = 300,
    packages: str = "stdlib",
    encoder: str = "hashing",
    seed: int = 0,
) -> dict[str, float]:
    """Measure.

    Args:
        passages: Functions to search among, at most.
        questions: Docstrings to ask for, at most.
        packages: ``stdlib`` and folders of installed packages, with commas between.
        encoder: ``hashing``, ``minilm``, or the import path of LangChain's ``Embeddings``.
        seed: Of the choice of files and questions.

    Returns:
        ``num_passages``, ``num_questions``; ``bm25_mrr``, ``dense_mrr``, ``hybrid_mrr``; ``hybrid_gain`` over the
        better of the two, and the ends ``hybrid_gain_low`` and ``hybrid_gain_high`` of its 95 % interval over
        questions (paired bootstrap); ``index_s``; ``p50_ms``, ``p99_ms``, and ``cpu_p50_ms``, ``cpu_p99_ms``:
        processor time of the same searches, which other work on the machine does not lengthen as much.

    Raises:
        ConfigError: No such package, or too few functions with docstrings.
        MissingExtraError: A package of the extra ``cortex`` is not installed.
    """
    from langchain_core.documents import Document

    from esper.cortex.encoder import build_encoder
    from esper.cortex.retrieval.store import PassageStore

    functions = read_functions(packages.split(","), passages, seed)
    asked = with_questions(functions, questions, seed)
    if len(asked) < 2:
        raise ConfigError(
            f"expected functions with docstrings in {packages}, got {len(asked)} of {len(functions)}"
        )
    texts = [functions[i].question for i in asked]
    right = [str(i) for i in asked]
    with tempfile.TemporaryDirectory() as folder, PassageStore(folder, build_encoder(encoder)) as store:
        began = time.perf_counter()
        for start in range(0, len(functions), _GROUP):
            group = list(enumerate(functions))[start : start + _GROUP]
            store.add_documents(
                [
                    Document(
                        id=str(i), page_content=f.code, metadata={"source": f.source, "start_line": f.line}
                    )
                    for i, f in group
                ]
            )
        store.save()
        index_s = time.perf_counter() - began
        bm25, _ = _reciprocal_ranks(store, texts, right, "sparse")
        dense, _ = _reciprocal_ranks(store, texts, right, "dense")
        hybrid, (times_ms, cpu_ms) = _reciprocal_ranks(store, texts, right, "hybrid")
    better = bm25 if bm25.mean() >= dense.mean() else dense
    rows = np.random.default_rng(seed).integers(len(asked), size=(_RESAMPLES, len(asked)))
    low, high = np.percentile((hybrid - better)[rows].mean(axis=1), [2.5, 97.5])
    return {
        "num_passages": float(len(functions)),
        "num_questions": float(len(asked)),
        "bm25_mrr": float(bm25.mean()),
        "dense_mrr": float(dense.mean()),
        "hybrid_mrr": float(hybrid.mean()),
        "hybrid_gain": float((hybrid - better).mean()),
        "hybrid_gain_low": float(low),
        "hybrid_gain_high": float(high),
        "index_s": index_s,
        "p50_ms": float(np.percentile(times_ms, 50)),
        "p99_ms": float(np.percentile(times_ms, 99)),
        "cpu_p50_ms": float(np.percentile(cpu_ms, 50)),
        "cpu_p99_ms": float(np.percentile(cpu_ms, 99)),
    }


def _reciprocal_ranks(
    store: PassageStore, questions: Sequence[str], right: Sequence[str], mode: Mode
) -> tuple[np.ndarray, tuple[list[float], list[float]]]:
    """One over the rank of each right passage (0 beyond the top), and each search's ms: by clock, of processor."""
    from esper.cortex.retrieval.search import search_passages

    found: list[float] = []
    times_ms: list[float] = []
    cpu_ms: list[float] = []
    for question, wanted in zip(questions, right, strict=True):
        began, cpu_began = time.perf_counter(), time.process_time()
        hits = search_passages(store, question, _TOP, mode=mode)
        times_ms.append(1e3 * (time.perf_counter() - began))
        cpu_ms.append(1e3 * (time.process_time() - cpu_began))
        ids = [hit.document.id for hit in hits]
        found.append(1.0 / (ids.index(wanted) + 1) if wanted in ids else 0.0)
    return np.array(found), (times_ms, cpu_ms)
