"""Features of nodes and edges."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.tamiyo.graph.features import EDGE_FEATURES, NODE_FEATURES, Column, columns, log_ratio
from esper.tamiyo.policies.shape import WIDENING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.tamiyo.graph.facts import SeedFacts
    from esper.tamiyo.graph.layout import Layout
    from esper.tamiyo.graph.trends import SignalWindow

__all__ = ["Grown", "edge_features", "node_features"]


class Grown(NamedTuple):
    """A layout as it stands now, with its seeds.

    Attributes:
        widths: Units of each node, grown ones included [N].
        necks: Log neck of each node with those widths [N].
        seeds: Seeds that start or end at each node [N].
        along: (source, target) node -> seeds from the input of the one to the output of the other.
        depth: Depth of each node over that of the deepest [N].
        over_median: Log of the units of each node over the median node's [N].
    """

    widths: Column
    necks: Column
    seeds: Column
    along: Counter[tuple[int, int]]
    depth: Column
    over_median: Column

    @classmethod
    def of(cls, layout: Layout, seeds: Sequence[SeedFacts]) -> Grown:
        """Count the seeds of a run into ``layout``."""
        widths, touched = layout.widths.copy(), np.zeros(layout.num_nodes)
        along: Counter[tuple[int, int]] = Counter()
        edges = set(zip(layout.source.tolist(), layout.target.tolist(), strict=True)) if seeds else set()
        for seed in seeds:
            pair = (layout.node(seed.source, reads=True), layout.node(seed.target, reads=False))
            for node in set(pair):
                touched[node] += 1
            if pair[0] != pair[1]:
                along[pair] += 1
            if (
                seed.blueprint in WIDENING and pair in edges
            ):  # over one hidden layer: as wide as itself and the seed
                widths[pair[0]] += seed.size
        known = widths[widths > 0]
        median = float(np.median(known)) if len(known) else 0.0
        depth = layout.depth / max(1, int(layout.depth.max(initial=0)))
        return cls(widths, layout.necks(widths), touched, along, depth, log_ratio(widths, median))


def node_features(layout: Layout, grown: Grown, window: SignalWindow, size: int) -> NDArray[np.float32]:
    """Features of all nodes [N, 16], as :data:`~esper.tamiyo.graph.features.NODE_FEATURES` names them.

    Args:
        layout: The nodes.
        grown: With their seeds.
        window: Their signals.
        size: Signals that a full window holds.
    """
    heard = window.heard
    gradient = window.last("gradient_norm")
    spoke = np.log(gradient[gradient > 0])
    mean = np.exp(spoke.mean()) if len(spoke) else 0.0
    update = np.log10(np.clip(window.last("update_ratio"), 1e-8, 1.0)) + 3.0
    rank = window.last("effective_rank") / np.maximum(grown.widths, 1.0)
    values = {
        "heard": np.log1p(window.count) / np.log1p(max(1, size)),
        "health": window.mean_health,
        "health_trend": window.change,
        "dormancy": window.last("dormancy"),
        "dead_ratio": window.last("dead_neuron_ratio"),
        "rank_share": np.where(grown.widths > 0, np.minimum(rank, 1.0), 0.0),
        "correlation": window.last("avg_correlation"),
        "gradient_share": log_ratio(gradient, mean) / 4.0,
        "gradient_snr": np.log1p(window.last("gradient_snr")) / 2.0,
        "update_ratio": np.where(heard, update / 3.0, 0.0),
        "width": np.log2(1.0 + grown.widths) / 8.0,
        "width_over_median": grown.over_median / 2.0,
        "neck": grown.necks / 2.0,
        "depth": grown.depth,
        "is_output": layout.is_output,
        "seeds": np.log1p(grown.seeds),
    }
    return columns(NODE_FEATURES, values, layout.num_nodes)


def edge_features(layout: Layout, grown: Grown) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Edges [2, E] and their features [E, 8]; a seed that leads further than any edge adds an edge of its own."""
    edges = list(zip(layout.source.tolist(), layout.target.tolist(), strict=True))
    known = set(edges)
    added = sorted(pair for pair in grown.along if pair not in known)
    ways = np.array([way for way in layout.ways] + [(0, 0, 0, 1)] * len(added), np.float64).reshape(-1, 4)
    index = np.array(edges + added, np.int64).reshape(-1, 2).T
    source, target = index
    inflow = np.bincount(target, minlength=layout.num_nodes)
    seeds = [grown.along.get(pair, 0) for pair in edges + added] if grown.along else 0
    values = {
        "nonlinear": ways[:, 1],
        "mixed": ways[:, 2],
        "residual": ways[:, 3],
        "passed": np.log1p(ways[:, 0]),
        "width_change": log_ratio(grown.widths[target], grown.widths[source]) / 2.0,
        "span": np.log(np.maximum(1, layout.depth[target] - layout.depth[source])),
        "inflow": 1.0 / np.maximum(1, inflow[target]),
        "grown": np.log1p(seeds),
    }
    return index, columns(EDGE_FEATURES, values, index.shape[1])
