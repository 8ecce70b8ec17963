"""Passages of files, found again by what they say, with the file and the lines they stand in."""

from esper.cortex.retrieval.citations import citation, visible
from esper.cortex.retrieval.fusion import reciprocal_rank_fusion
from esper.cortex.retrieval.indexing import IndexingConfig, IndexingReport, index_paths
from esper.cortex.retrieval.search import Hit, HybridRetriever, search_passages
from esper.cortex.retrieval.splitting import split_text
from esper.cortex.retrieval.store import PassageStore

__all__ = [
    "Hit",
    "HybridRetriever",
    "IndexingConfig",
    "IndexingReport",
    "PassageStore",
    "citation",
    "index_paths",
    "reciprocal_rank_fusion",
    "search_passages",
    "split_text",
    "visible",
]
