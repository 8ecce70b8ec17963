"""The document's older view of a model: its layers one by one, with what their health signals say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from esper.kasmina.topology import ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.graph.builder import ModelGraphBuilder

__all__ = ["LayerNode", "ModelGraphAnalyzer"]


@dataclass(frozen=True)
class LayerNode:
    """One layer.

    Attributes:
        layer_id: Its qualified name.
        layer_type: Class of the module; empty where no topology was given.
        num_signals: Of the layer itself; its seeds speak for themselves.
        health: Mean health score in [0, 1]; None where the layer did not speak.
        trend: Slope of the health score over the signals, a sampled step.
        problem: Why it counts as problematic; empty where it does not.
        inputs: Layers that feed it.
        outputs: Layers that it feeds.
    """

    layer_id: str
    layer_type: str
    num_signals: int
    health: float | None
    trend: float
    problem: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class ModelGraphAnalyzer:
    """Says of each layer how it is; the graph that a policy decides on is :class:`ModelGraphBuilder`'s.

    Args:
        builder: Whose trends and problems are told.
    """

    def __init__(self, builder: ModelGraphBuilder | None = None) -> None:
        self._builder = builder if builder is not None else ModelGraphBuilder()

    def analyze(
        self, health_signals: Sequence[HealthSignal], model_topology: ModelTopology | None = None
    ) -> dict[str, LayerNode]:
        """Name -> layer, by data flow; without a topology in the order in which they first spoke."""
        state = self._builder.build_model_graph(health_signals, model_topology)
        own = [signal for signal in health_signals if not signal.seed_id]
        nodes = {}
        for name in state.node_names:
            scores = [signal.health_score for signal in own if signal.layer_id == name]
            edges_in = model_topology.producers(name) if model_topology is not None else ()
            edges_out = model_topology.consumers(name) if model_topology is not None else ()
            nodes[name] = LayerNode(
                layer_id=name,
                layer_type=model_topology.layer(name).type if model_topology is not None else "",
                num_signals=len(scores),
                health=statistics.fmean(scores) if scores else None,
                trend=state.health_trends.get(name, 0.0),
                problem=state.problematic_layers.get(name, ""),
                inputs=tuple(edge.source for edge in edges_in),
                outputs=tuple(edge.target for edge in edges_out),
            )
        return nodes

    def problematic(
        self, health_signals: Sequence[HealthSignal], model_topology: ModelTopology | None = None
    ) -> list[LayerNode]:
        """The layers that have a problem, the least healthy first."""
        found = [node for node in self.analyze(health_signals, model_topology).values() if node.problem]
        return sorted(found, key=lambda node: 1.0 if node.health is None else node.health)
