"""The tensors of one decision point, as a torch-geometric graph that batches its candidates too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from esper.tamiyo.geometric import Data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.kasmina.topology import ModelTopology
    from esper.messages import HealthSignal
    from esper.tamiyo.graph.facts import Candidate, DecisionPoint

__all__ = ["CandidateGraph", "ModelGraphState"]


class CandidateGraph(Data):
    """A model graph with N nodes, E edges, and C candidates that have M placements between them.

    Attributes:
        x: Node features [N, 16].
        edge_index: Data flow [2, E].
        edge_attr: Edge features [E, 8].
        global_features: [1, G].
        candidate_attr: Candidate features [C, F].
        candidate_mask: Which candidates may be chosen [C], bool; WAIT (row 0 of a graph) always may.
        candidate_batch: Graph of each candidate [C]; all 0 until graphs are batched.
        placement_index: Source and target node of each placement [2, M].
        placement_candidate: Candidate of each placement [M].

    Batching by ``torch_geometric.data.Batch.from_data_list`` shifts every index by what it counts.
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if key == "placement_index":
            return self.num_nodes
        if key == "placement_candidate":
            return self.candidate_attr.size(0)
        if key == "candidate_batch":
            return 1
        return super().__inc__(key, value, *args, **kwargs)

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if key == "placement_index":
            return -1
        return super().__cat_dim__(key, value, *args, **kwargs)


@dataclass(frozen=True)
class ModelGraphState:
    """A decision point as a policy network sees it, with what people want to look at beside it.

    Attributes:
        graph_data: The tensors.
        candidates: What the rows of ``graph_data.candidate_attr`` stand for, WAIT first.
        node_names: Layer name of each node.
        timestamp: Unix seconds.
        health_signals: What it was made from, oldest first.
        topology: The traced host.
        global_metrics: Name -> value, of the whole model.
        health_trends: Layer -> slope of its health score over the window, a sampled step.
        problematic_layers: Layer -> why (mean health, errors, slope, latency against its own baseline).
        point: The facts; None for a state that was built from signals alone.
    """

    graph_data: CandidateGraph
    candidates: Sequence[Candidate]
    node_names: Sequence[str]
    timestamp: float
    health_signals: Sequence[HealthSignal]
    topology: ModelTopology | None
    global_metrics: Mapping[str, float] = field(default_factory=dict)
    health_trends: Mapping[str, float] = field(default_factory=dict)
    problematic_layers: Mapping[str, str] = field(default_factory=dict)
    point: DecisionPoint | None = None

    @property
    def mask(self) -> Tensor:
        """Which candidates may be chosen [C]."""
        mask: Tensor = self.graph_data.candidate_mask
        return mask
