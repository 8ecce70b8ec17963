"""Small random graphs with candidates, as the network sees them."""

from __future__ import annotations

import torch

from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.network.config import PolicyConfig

SMALL = PolicyConfig(hidden_dim=16, num_gnn_layers=2, uncertainty_samples=4)


def random_graph(
    num_nodes: int = 6, num_candidates: int = 5, *, seed: int = 0, config: PolicyConfig = SMALL
) -> CandidateGraph:
    """A chain of layers with one skip; each candidate but WAIT has one or two placements."""
    rng = torch.Generator().manual_seed(seed)
    chain = [[i, i + 1] for i in range(num_nodes - 1)] + ([[0, num_nodes - 1]] if num_nodes > 2 else [])
    edges = torch.tensor(chain, dtype=torch.long).view(-1, 2).T
    placed = [c for c in range(1, num_candidates) for _ in range(1 + c % 2)] if num_nodes else []
    available = torch.rand(num_candidates, generator=rng) > 0.3
    available[:2] = True
    return CandidateGraph(
        x=torch.randn(num_nodes, config.node_feature_dim, generator=rng),
        edge_index=edges.contiguous(),
        edge_attr=torch.randn(edges.shape[1], config.edge_feature_dim, generator=rng),
        global_features=torch.randn(1, config.global_feature_dim, generator=rng),
        candidate_attr=torch.randn(num_candidates, config.candidate_feature_dim, generator=rng),
        candidate_mask=available,
        candidate_batch=torch.zeros(num_candidates, dtype=torch.long),
        placement_index=torch.randint(0, max(1, num_nodes), (2, len(placed)), generator=rng),
        placement_candidate=torch.tensor(placed, dtype=torch.long),
    )
