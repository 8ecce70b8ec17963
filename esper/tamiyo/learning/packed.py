"""Graphs packed into two arrays each, as tens of thousands of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.errors import CheckpointError, DataFormatError
from esper.tamiyo.graph.data import CandidateGraph

__all__ = ["PackedGraph", "batch", "pack_many", "unpack_many"]

_NUM_SIZES = 8
_COLUMNS = ("edge_index", "placement_index")
"""Fields [2, *], joined along their columns."""


@dataclass(frozen=True)
class PackedGraph:
    """A :class:`CandidateGraph` as two flat arrays; a tensor object for each field would weigh more than its content.

    Attributes:
        sizes: N, node features, E, edge features, G, C, candidate features, M.
        floats: x, edge_attr, global_features, candidate_attr, one after another.
        integers: edge_index, candidate_mask, placement_index, placement_candidate, one after another.
    """

    sizes: tuple[int, ...]
    floats: NDArray[np.float32]
    integers: NDArray[np.int32]

    @classmethod
    def pack(cls, graph: CandidateGraph) -> PackedGraph:
        """Copy one graph.

        Raises:
            DataFormatError: Shapes do not fit together, there is no candidate, WAIT is masked out, a feature
                is NaN or inf or not float32, or an index points outside.
        """
        sizes = _check(graph)
        floats = (graph.x, graph.edge_attr, graph.global_features, graph.candidate_attr)
        integers = (graph.edge_index, graph.candidate_mask, graph.placement_index, graph.placement_candidate)
        return cls(
            sizes,
            torch.cat([t.detach().reshape(-1) for t in floats]).cpu().numpy().copy(),
            torch.cat([t.detach().reshape(-1).to(torch.int32) for t in integers]).cpu().numpy().copy(),
        )

    @property
    def num_candidates(self) -> int:
        """C."""
        return self.sizes[5]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which candidates may be chosen [C]."""
        start = 2 * self.sizes[2]
        return self.integers[start : start + self.sizes[5]].astype(bool)

    @property
    def parts(self) -> dict[str, NDArray[Any]]:
        """Views of the fields, named and shaped as in :class:`CandidateGraph`."""
        n, f, e, d, g, c, h, m = self.sizes
        x, edge_attr, global_features, candidate_attr = _cut(self.floats, n * f, e * d, g, c * h)
        edge_index, mask, placement_index, placement_candidate = _cut(self.integers, 2 * e, c, 2 * m, m)
        return {
            "x": x.reshape(n, f),
            "edge_index": edge_index.reshape(2, e),
            "edge_attr": edge_attr.reshape(e, d),
            "global_features": global_features.reshape(1, g),
            "candidate_attr": candidate_attr.reshape(c, h),
            "candidate_mask": mask,
            "placement_index": placement_index.reshape(2, m),
            "placement_candidate": placement_candidate,
        }

    def unpack(self) -> CandidateGraph:
        """Rebuild the graph; its tensors are its own."""
        graph = batch([self])
        del graph["batch"], graph["ptr"]
        return graph


def batch(graphs: Sequence[PackedGraph]) -> CandidateGraph:
    """Join graphs, at least one, in order.

    The same tensors as ``Batch.from_data_list`` gives, ten times as fast: that one asks every tensor of every
    graph how it is to be joined.

    Returns:
        One graph with ``batch`` and ``ptr``, the graph of each node and where each graph's nodes begin.
    """
    parts = [graph.parts for graph in graphs]
    nodes, candidates, placements = (np.array([g.sizes[i] for g in graphs]) for i in (0, 5, 7))
    first_node, first_candidate = (np.cumsum(counts) - counts for counts in (nodes, candidates))
    joined = {
        name: np.concatenate([p[name] for p in parts], axis=1 if name in _COLUMNS else 0) for name in parts[0]
    }
    edges = np.array([g.sizes[2] for g in graphs])
    numbers = np.arange(len(graphs))
    integers = {
        "edge_index": joined.pop("edge_index") + np.repeat(first_node, edges),
        "placement_index": joined.pop("placement_index") + np.repeat(first_node, placements),
        "placement_candidate": joined.pop("placement_candidate") + np.repeat(first_candidate, placements),
        "candidate_batch": np.repeat(numbers, candidates),
        "batch": np.repeat(numbers, nodes),
        "ptr": np.append(first_node, nodes.sum()),
    }
    return CandidateGraph(
        candidate_mask=torch.from_numpy(joined.pop("candidate_mask").astype(bool)),
        **{name: torch.from_numpy(array) for name, array in joined.items()},
        **{name: torch.from_numpy(array.astype(np.int64)) for name, array in integers.items()},
    )


def pack_many(graphs: Sequence[PackedGraph]) -> dict[str, Tensor]:
    """All graphs in three tensors, for a file."""
    return {
        "sizes": torch.tensor([g.sizes for g in graphs], dtype=torch.long).view(len(graphs), _NUM_SIZES),
        "floats": torch.from_numpy(np.concatenate([g.floats for g in graphs] or [np.empty(0, np.float32)])),
        "integers": torch.from_numpy(np.concatenate([g.integers for g in graphs] or [np.empty(0, np.int32)])),
    }


def unpack_many(tensors: dict[str, Tensor]) -> list[PackedGraph]:
    """Undo :func:`pack_many`.

    Raises:
        CheckpointError: The three tensors do not fit together.
    """
    sizes, floats, integers = (tensors[name] for name in ("sizes", "floats", "integers"))
    graphs = []
    at = [0, 0]
    for row in sizes.tolist():
        n, f, e, d, g, c, h, m = row
        ends = [at[0] + n * f + e * d + g + c * h, at[1] + 2 * e + c + 3 * m]
        graphs.append(
            PackedGraph(
                tuple(row), floats[at[0] : ends[0]].numpy().copy(), integers[at[1] : ends[1]].numpy().copy()
            )
        )
        at = ends
    if at != [floats.numel(), integers.numel()]:
        raise CheckpointError(
            f"expected graphs of {at[0]} floats and {at[1]} integers in all, got {floats.numel()} and "
            f"{integers.numel()}; the replay buffer in this checkpoint is damaged"
        )
    return graphs


def _check(graph: CandidateGraph) -> tuple[int, ...]:
    """Sizes of a graph that is as :class:`CandidateGraph` says."""
    n, f = _matrix(graph, "x")
    e, d = _matrix(graph, "edge_attr")
    one, g = _matrix(graph, "global_features")
    c, h = _matrix(graph, "candidate_attr")
    m = graph.placement_candidate.numel()
    wrong = [
        *([] if one == 1 else ["global_features [1, G]"]),
        *([] if c >= 1 else ["at least one candidate"]),
        *([] if graph.edge_index.shape == (2, e) else [f"edge_index [2, {e}]"]),
        *([] if graph.candidate_mask.shape == (c,) else [f"candidate_mask [{c}]"]),
        *([] if graph.placement_index.shape == (2, m) else [f"placement_index [2, {m}]"]),
    ]
    if not wrong:
        wrong = [
            *([] if bool(graph.candidate_mask[0]) else ["WAIT (candidate 0) available"]),
            *([] if _within(graph.edge_index, n) else [f"edge_index within {n} nodes"]),
            *([] if _within(graph.placement_index, n) else [f"placement_index within {n} nodes"]),
            *(
                []
                if _within(graph.placement_candidate, c)
                else [f"placement_candidate within {c} candidates"]
            ),
        ]
    if wrong:
        raise DataFormatError(f"expected a graph with {', '.join(wrong)}; got {graph}")
    return (n, f, e, d, g, c, h, m)


def _matrix(graph: CandidateGraph, name: str) -> tuple[int, int]:
    tensor = graph[name]
    if tensor.ndim != 2 or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
        raise DataFormatError(
            f"expected {name} as a finite float32 matrix, got shape {tuple(tensor.shape)}, {tensor.dtype}"
            f"{'' if bool(tensor.isfinite().all()) else ', with NaN or inf'}; a feature was built wrongly"
        )
    return tensor.shape[0], tensor.shape[1]


def _within(index: Tensor, num: int) -> bool:
    return index.numel() == 0 or bool((index >= 0).all() and (index < num).all())


def _cut(array: NDArray[Any], *lengths: int) -> list[NDArray[Any]]:
    ends = np.cumsum(lengths)
    return [array[end - length : end] for end, length in zip(ends, lengths, strict=True)]
