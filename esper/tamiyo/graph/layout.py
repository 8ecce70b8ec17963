"""Which layers of a traced host are nodes, and how data flows between them.

Nodes are the leaf layers that can carry seeds. What cannot (norms, embeddings, refused layers) is led around:
whoever feeds it feeds its readers, so that a residual stream that passes through norms alone stays one. Blocks
are no nodes, since their layers are; a seed behind a block starts at its first layer and ends at its last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.errors import MessageError
from esper.kasmina.activations import is_activation, is_elementwise
from esper.tamiyo.graph.features import Column, log_ratio
from esper.tamiyo.policies.shape import layers_in_series, units

if TYPE_CHECKING:
    from esper.kasmina.topology import Edge, LayerInfo, ModelTopology

__all__ = ["Layout", "Way"]

Indices = NDArray[np.int64]


class Way(NamedTuple):
    """What lies between two nodes; of several ways the least one counts."""

    passed: int
    nonlinear: bool
    mixed: bool
    residual: bool


class Layout:
    """A topology as arrays: N nodes, E edges.

    Args:
        topology: The traced host, producers first.

    Attributes:
        names: Layer of each node, in the topology's order [N].
        source: Source node of each edge [E].
        target: Target node of each edge [E].
        ways: What lies along each edge [E].
        widths: Units each node gives, without grown ones [N]; 0 where a shape is not known.
        inputs: Units each node reads [N].
        depth: Edges on the longest way from a node without producers [N].
        is_output: [N], bool.
        image: Gives feature maps [N], bool.
        series: Fewest layers between input and output.
        flops: One forward pass of one sample of the host.
    """

    def __init__(self, topology: ModelTopology) -> None:
        nodes = [layer for layer in topology.layers if is_node(topology, layer)]
        self.topology = topology
        self.names = [layer.name for layer in nodes]
        self.index = {name: i for i, name in enumerate(self.names)}
        self._block_names = {layer.name for layer in topology.layers if layer.block}
        found = _contracted(topology, self.index)
        self.source = np.array([u for u, _ in found], np.int64)
        self.target = np.array([v for _, v in found], np.int64)
        self.ways = list(found.values())
        self._before: list[list[int]] = [[] for _ in nodes]
        self._behind: list[list[int]] = [[] for _ in nodes]
        for u, v in found:
            if u < v:
                self._before[v].append(u)
                self._behind[u].append(v)
        self.widths = np.array([_known_units(n.output_shape, n.image) for n in nodes], np.float64)
        self.inputs = np.array([_known_units(n.input_shape, n.image) for n in nodes], np.float64)
        self.is_output = np.array([layer.is_output for layer in nodes], bool)
        self.image = np.array([layer.image for layer in nodes], bool)
        self.depth = self._depths()
        self.series = layers_in_series(topology)
        self.flops = sum(layer.flops for layer in topology.layers if not layer.block)
        self._places: dict[tuple[str, bool], int] = {}
        self._necks: tuple[bytes, Column] | None = None

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.names)

    def node(self, layer: str, *, reads: bool) -> int:
        """The node that stands for ``layer`` as a place's source (``reads``) or target.

        Raises:
            MessageError: The topology has no such layer, or no node anywhere near it.
        """
        if (found := self.index.get(layer)) is not None:
            return found
        key = (layer, reads)
        if key not in self._places:
            self._places[key] = self._near(layer, reads)
        return self._places[key]

    def necks(self, widths: Column) -> Column:
        """log(width / smaller of the widest node before and the widest behind) [N]; below 0 for a neck.

        The input counts as before, as in :mod:`esper.tamiyo.policies.shape`.
        """
        key = widths.tobytes()
        if self._necks is None or self._necks[0] != key:
            w, n = widths.tolist(), self.num_nodes
            before, behind = self.inputs.tolist(), [0.0] * n
            for v in range(n):
                if self._before[v]:
                    before[v] = max(max(w[u], before[u]) for u in self._before[v])
            for u in reversed(range(n)):
                behind[u] = max((max(w[v], behind[v]) for v in self._behind[u]), default=w[u])
            self._necks = key, log_ratio(widths, np.minimum(before, behind))
        return self._necks[1]

    def _depths(self) -> Indices:
        depth = [0] * self.num_nodes
        for v, producers in enumerate(self._before):
            depth[v] = 1 + max((depth[u] for u in producers), default=-1)
        return np.array(depth, np.int64)

    def _near(self, layer: str, reads: bool) -> int:
        """By what the graph says alone, so that the order in which layers are listed makes no difference."""
        inside = [i for name, i in self.index.items() if name.startswith(f"{layer}.")]
        if layer in self._block_names and inside:
            order = sorted(inside, key=lambda i: (self.depth[i], self.names[i]))
            return order[0] if reads else order[-1]
        owner = layer.rpartition(".")[0]  # a part whose weight its owner uses without calling it
        while owner and owner not in self.index:
            owner = owner.rpartition(".")[0]
        if owner:
            return self.index[owner]
        if layer in self.topology.layer_names:
            near = _reached(self.topology, layer, self.index, forward=reads) or _reached(
                self.topology, layer, self.index, forward=not reads
            )
            if near:
                sign = 1 if reads else -1
                return min(near, key=lambda i: (sign * int(self.depth[i]), self.names[i]))
        raise MessageError(
            f"expected a layer of the topology ({len(self.names)} seed layers) in a candidate's placement, got "
            f"{layer!r}; topology and candidates should come from one decision point"
        )


def is_node(topology: ModelTopology, layer: LayerInfo) -> bool:
    """Whether ``layer`` is a leaf that can carry seeds."""
    seedless = layer.block or "Norm" in layer.type or layer.type.startswith("Embedding")
    return not seedless and layer.name not in topology.refused


def _known_units(shape: Sequence[int], image: bool) -> int:
    return units(shape, image) if shape else 0


def _contracted(topology: ModelTopology, index: Mapping[str, int]) -> dict[tuple[int, int], Way]:
    """Edges between nodes, the least way along each, in the order of source and target."""
    found: dict[tuple[int, int], Way] = {}
    for name, u in index.items():
        stack = [(edge, Way(0, False, False, False)) for edge in topology.consumers(name)]
        seen: dict[str, Way] = {}
        while stack:
            edge, so_far = stack.pop()
            way = _further(so_far, _along(edge.ops))
            v = index.get(edge.target)
            if v is not None:
                if v != u:
                    found[u, v] = min(way, found.get((u, v), way))
                continue
            way = Way(way.passed + 1, *way[1:])
            if edge.target not in seen or way < seen[edge.target]:
                seen[edge.target] = way
                stack += [(following, way) for following in topology.consumers(edge.target)]
    return dict(sorted(found.items()))


def _further(a: Way, b: Way) -> Way:
    return Way(a.passed + b.passed, a.nonlinear or b.nonlinear, a.mixed or b.mixed, a.residual or b.residual)


@lru_cache(maxsize=4096)
def _along(ops: tuple[str, ...]) -> Way:
    sums = [op for op in ops if op.startswith("Add")]
    rest = [op for op in ops if not op.startswith("Add")]
    return Way(0, any(map(is_activation, rest)), not all(map(is_elementwise, rest)), bool(sums))


def _reached(topology: ModelTopology, layer: str, index: Mapping[str, int], *, forward: bool) -> list[int]:
    """Nodes that ``layer``, no node itself, feeds (or is fed by) with no other node between."""
    seen, stack, found = {layer}, [layer], set()
    while stack:
        name = stack.pop()
        edges: Sequence[Edge] = topology.consumers(name) if forward else topology.producers(name)
        for edge in edges:
            other = edge.target if forward else edge.source
            if other in index:
                found.add(index[other])
            elif other not in seen:
                seen.add(other)
                stack.append(other)
    return sorted(found)
