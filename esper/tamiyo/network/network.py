"""The policy network: from a decision point's graph to preferences over its candidates.

Shape legend: ``B`` graphs, ``N`` nodes, ``E`` edges, ``C`` candidates, ``M`` placements (all summed over the batch),
``S`` samples, ``H`` channels, ``G``, ``F`` features of run and candidate.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.tamiyo.geometric import scatter
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.distribution import CandidateDistribution
from esper.tamiyo.network.layers import ChannelDropout, Flow, GraphLayer, Rows, mlp, pool

__all__ = ["NodeEncoder", "PolicyOutput", "TamiyoNetwork"]


class PolicyOutput(NamedTuple):
    """What the network says of a batch of graphs.

    Attributes:
        logits: Preference for each candidate [C], unavailable ones too: :meth:`TamiyoNetwork.distribution` masks
            them.
        value: Expected utility at the end of the run, against waiting throughout, of acting by these
            preferences [B], in nats.
        urgency: Expected cost of waiting one decision interval [B] ≥ 0, in nats.
        risk: Probability that a candidate ends in a cull or a rollback [C]; 0 for WAIT.
    """

    logits: Tensor
    value: Tensor
    urgency: Tensor
    risk: Tensor


class NodeEncoder(nn.Module):
    """Features of a layer to H channels, with a residual block.

    Args:
        node_dim: Features.
        hidden_dim: H.
        dropout: Share of channels dropped.
    """

    def __init__(self, node_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(node_dim, hidden_dim)
        self.block = mlp(hidden_dim, hidden_dim, hidden_dim)
        self.dropout = ChannelDropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, rows: Rows, generator: torch.Generator | None = None) -> Tensor:
        """Map [N, features] to [N, H], or [N, S, features] to [N, S, H]."""
        h = self.project(x)
        return cast(Tensor, self.norm(h + self.dropout(self.block(h).relu(), rows, generator)))


class TamiyoNetwork(nn.Module):
    """Attention and convolution over a model's layers; one logit for each thing that could be done.

    A candidate is described by where it would act (mean over its placements of an MLP of the source's and the
    target's embeddings), by its own features, and by the whole graph (pooled nodes and the run's features).
    Outputs do not depend on the order of nodes or placements, and follow the order of candidates.

    Args:
        config: Sizes and thresholds.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        self.encoder = NodeEncoder(config.node_feature_dim, hidden, config.feature_dropout)
        self.layers = nn.ModuleList(
            GraphLayer(
                hidden,
                config.edge_feature_dim + 1,
                config.num_attention_heads,
                attention_dropout=config.attention_dropout,
                feature_dropout=config.feature_dropout,
            )
            for _ in range(config.num_gnn_layers)
        )
        self.node_norm = nn.LayerNorm(hidden)
        self.context = mlp(2 * hidden + config.global_feature_dim, hidden, hidden)
        self.placement = mlp(2 * hidden, hidden, hidden)
        self.candidate = mlp(config.candidate_feature_dim, hidden, hidden)
        self.candidate_norm = nn.LayerNorm(hidden)
        self.head_dropout = ChannelDropout(config.head_dropout)
        self.logit_head = mlp(2 * hidden, hidden, 1)
        self.risk_head = mlp(2 * hidden, hidden // 2, 1)
        self.graph_head = mlp(3 * hidden, hidden, 2)

    def forward(self, graph: CandidateGraph) -> PolicyOutput:
        """Rate the candidates of a graph or of a batch of graphs.

        Args:
            graph: One decision point, or several joined by ``Batch.from_data_list``.

        Raises:
            ConfigError: The graph's features are not as many as the network was made for.
        """
        self._check(graph)
        flow, rows = self._flow(graph)
        h = self.encoder(graph.x, rows)
        for layer in self.layers:
            h = layer(h, flow, rows)
        return self._heads(graph, h, rows)

    def sample(self, graph: CandidateGraph, seed: int = 0) -> Tensor:
        """Logits [S, C] of ``uncertainty_samples`` passes with dropout of channels.

        Masks come from a generator of their own: the same graph gets the same samples, alone or in a batch,
        and torch's global random numbers are not touched. What lies before the last ``num_sampled_layers``
        graph layers is passed through once; if all are sampled, so is the encoder.

        Args:
            graph: As for :meth:`forward`.
            seed: Of the masks.

        Raises:
            ConfigError: As for :meth:`forward`; or the network is in training mode, where what is passed
                through once would be random too.
        """
        if self.training:
            raise ConfigError(
                "a network samples its uncertainty in eval mode, this one is in training mode; call eval()"
            )
        self._check(graph)
        flow, rows = self._flow(graph)
        generator = torch.Generator(graph.x.device).manual_seed(seed)
        num_fixed = len(self.layers) - self.config.num_sampled_layers
        if num_fixed == 0:
            h = self.encoder(self._repeat(graph.x), rows, generator)
        else:
            h = self.encoder(graph.x, rows)
        for place, layer in enumerate(self.layers):
            if place < num_fixed:
                h = layer(h, flow, rows)
            else:
                h = layer(self._repeat(h) if h.dim() == 2 else h, flow, rows, generator)
        if h.dim() == 2:
            h = self._repeat(h)
        return self._heads(graph, h, rows, generator).logits.T

    def distribution(self, output: PolicyOutput, graph: CandidateGraph) -> CandidateDistribution:
        """The distribution over available candidates that the preferences mean."""
        return CandidateDistribution(
            output.logits, graph.candidate_mask, graph.candidate_batch, len(graph.global_features)
        )

    def _heads(
        self, graph: CandidateGraph, h: Tensor, rows: Rows, generator: torch.Generator | None = None
    ) -> PolicyOutput:
        """Outputs from embeddings of nodes [N, H], or [N, S, H] (then with S between rows and channels)."""
        h = self.node_norm(h)
        num_graphs, num_candidates = rows.num_graphs, len(graph.candidate_attr)
        run, own = graph.global_features, self.candidate(graph.candidate_attr)
        if h.dim() == 3:
            run, own = self._repeat(run), own.unsqueeze(1)
        graphs = Rows(torch.arange(num_graphs, device=h.device), num_graphs)
        candidates = Rows(graph.candidate_batch, num_graphs)
        context = self.context(torch.cat([pool(h, rows), run], -1)).relu()
        context = self.head_dropout(context, graphs, generator)
        source, target = graph.placement_index
        placed = self.placement(torch.cat([h[source], h[target]], -1))
        placed = scatter(placed, graph.placement_candidate, 0, num_candidates, "mean")
        z = self.head_dropout(self.candidate_norm(placed + own).relu(), candidates, generator)
        about = torch.cat([z, context[graph.candidate_batch]], -1)
        available = graph.candidate_mask
        offered = pool(z[available], Rows(graph.candidate_batch[available], num_graphs))
        value, urgency = self.graph_head(torch.cat([context, offered], -1)).unbind(-1)
        risk = self.risk_head(about).squeeze(-1).sigmoid()
        wait = _first_of_each(graph.candidate_batch).view(-1, *[1] * (risk.dim() - 1))
        return PolicyOutput(
            logits=self.logit_head(about).squeeze(-1),
            value=value,
            urgency=F.softplus(urgency),
            risk=risk.masked_fill(wait, 0.0),
        )

    def _flow(self, graph: CandidateGraph) -> tuple[Flow, Rows]:
        num_nodes = len(graph.x)
        of_node = graph.batch
        if of_node is None:
            of_node = torch.zeros(num_nodes, dtype=torch.long, device=graph.x.device)
        flow = Flow.both_ways(graph.edge_index, graph.edge_attr, num_nodes)
        return flow, Rows(of_node, len(graph.global_features))

    def _repeat(self, rows: Tensor) -> Tensor:
        """[R, H] -> [R, S, H] without copying."""
        return rows.unsqueeze(1).expand(-1, self.config.uncertainty_samples, -1)

    def _check(self, graph: CandidateGraph) -> None:
        config = self.config
        wrong = [
            f"{tensor.shape[-1]} {what} features instead of {expected}"
            for what, tensor, expected in (
                ("node", graph.x, config.node_feature_dim),
                ("edge", graph.edge_attr, config.edge_feature_dim),
                ("global", graph.global_features, config.global_feature_dim),
                ("candidate", graph.candidate_attr, config.candidate_feature_dim),
            )
            if tensor.shape[-1] != expected
        ]
        if wrong:
            raise ConfigError(
                f"the graph does not fit the policy network: it has {', '.join(wrong)}; build it by the esper "
                "version that the network was made with, or train a network for these features"
            )


def _first_of_each(candidate_batch: Tensor) -> Tensor:
    """Which rows are the first of their graph [C]: WAIT."""
    first = torch.ones_like(candidate_batch, dtype=torch.bool)
    first[1:] = candidate_batch[1:] != candidate_batch[:-1]
    return first
