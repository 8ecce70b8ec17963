"""The policy network: from a decision point's graph to preferences over its candidates.

Shape legend: ``B`` graphs, ``N`` nodes, ``E`` edges, ``C`` candidates, ``M`` placements (all summed over the batch),
``S`` samples, ``H`` channels, ``G``, ``F`` features of run and candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.tamiyo.geometric import Batch, scatter
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.decision import AdaptationDecision, Verdict
from esper.tamiyo.network.distribution import CandidateDistribution
from esper.tamiyo.network.judging import Reading, judge
from esper.tamiyo.network.layers import (
    ChannelDropout,
    Flow,
    GraphLayer,
    Noise,
    PairMLP,
    Rows,
    like,
    mlp,
    pool,
)
from esper.tamiyo.network.novelty import Novelty
from esper.tamiyo.network.uncertainty import measure_uncertainty

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

    def forward(self, x: Tensor, rows: Rows, noise: Noise | None) -> Tensor:
        """Map [N, features] to [N, H], or [N, S, features] to [N, S, H]."""
        h = self.project(x)
        added = self.dropout(self.block(h).relu(), rows, noise)
        return cast(Tensor, self.norm(like(h, added) + added))


class TamiyoNetwork(nn.Module):
    """Attention and convolution over a model's layers; one logit for each thing that could be done.

    A candidate is described by where it would act (mean over its placements of an MLP of the source's and the
    target's embeddings), by its own features, and by the whole graph (pooled nodes and the run's features).
    Outputs do not depend on the order of nodes or placements, and follow the order of candidates.

    Args:
        config: Sizes and thresholds.

    Attributes:
        novelty: Knows where the training states lay, once it was fitted.
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
        self.placement = PairMLP(hidden, hidden)
        self.candidate = mlp(config.candidate_feature_dim, hidden, hidden)
        self.candidate_norm = nn.LayerNorm(hidden)
        self.head_dropout = ChannelDropout(config.head_dropout)
        self.logit_head = PairMLP(hidden, 1)
        self.risk_head = PairMLP(hidden, 1)
        self.graph_head = mlp(3 * hidden, hidden, 2)
        self.novelty = Novelty(config)

    def forward(self, graph: CandidateGraph) -> PolicyOutput:
        """Rate the candidates of a graph or of a batch of graphs.

        Args:
            graph: One decision point, or several joined by ``Batch.from_data_list``.

        Raises:
            ConfigError: The graph's features are not as many as the network was made for.
        """
        flow, rows = self._flow(graph)
        noise = Noise() if self.training else None
        h = self._through(graph.x, flow, rows, noise, 0, len(self.layers) + 1)
        return self._heads(graph, h, rows, noise)

    def sample(self, graph: CandidateGraph, seed: int = 0) -> tuple[PolicyOutput, Tensor]:
        """Rate candidates without dropout, and ``uncertainty_samples`` times with, in any mode.

        Masks come from a generator of their own: the same graph gets the same samples, alone or in a batch,
        and torch's global random numbers are not touched. What lies before the first dropout that is sampled,
        which stands at the end of its layer, is passed through once.

        Args:
            graph: As for :meth:`forward`.
            seed: Of the masks.

        Returns:
            The outputs without dropout, and logits [S, C] with it.

        Raises:
            ConfigError: As for :meth:`forward`.
        """
        flow, rows = self._flow(graph)
        end = len(self.layers) + 1
        sampled = self.config.num_sampled_layers
        start = 0 if sampled == len(self.layers) else end - sampled
        shared = self._through(graph.x, flow, rows, None, 0, start)
        output = self._heads(graph, self._through(shared, flow, rows, None, start, end), rows, None)
        num_samples = self.config.uncertainty_samples
        noise = Noise(torch.Generator(graph.x.device).manual_seed(seed), num_samples)
        noisy = self._through(shared, flow, rows, noise, start, end)
        logits = self._logits(graph, *self._embed(graph, noisy, rows, noise))
        # without any dropout there is one pass, which all samples would repeat
        return output, logits.T if logits.dim() == 2 else logits.expand(num_samples, -1)

    def make_decision(
        self, state: ModelGraphState, adaptations_this_epoch: int = 0
    ) -> AdaptationDecision | None:
        """Decide what to do at a decision point; None to do nothing. :meth:`decide` also says why.

        Args:
            state: Features of one decision point, and its candidates.
            adaptations_this_epoch: Decisions carried out in this epoch so far.

        Raises:
            ConfigError: As for :meth:`forward`.
        """
        verdict = self.decide(state, adaptations_this_epoch)
        return verdict.decision if verdict.outcome == "adapt" else None

    def decide(self, state: ModelGraphState, adaptations_this_epoch: int = 0) -> Verdict:
        """Judge a decision point; the same state gets the same verdict, in any mode.

        Args:
            state: Features of one decision point, and its candidates.
            adaptations_this_epoch: Decisions carried out in this epoch so far.

        Raises:
            ConfigError: As for :meth:`forward`.
        """
        return self.decide_all([state], [adaptations_this_epoch])[0]

    def decide_all(
        self, states: Sequence[ModelGraphState], adaptations_this_epoch: Sequence[int]
    ) -> list[Verdict]:
        """Judge several decision points in one pass; each as :meth:`decide` does, up to rounding.

        Args:
            states: Of any runs.
            adaptations_this_epoch: Of the run of each state.

        Raises:
            ConfigError: As for :meth:`forward`.
        """
        if not states:
            return []
        graphs = [state.graph_data for state in states]
        readings = self.read(graphs[0] if len(graphs) == 1 else Batch.from_data_list(graphs))
        each = zip(states, readings, adaptations_this_epoch, strict=True)
        return [judge(self.config, state, reading, count) for state, reading, count in each]

    @torch.no_grad()
    def read(self, graph: CandidateGraph) -> list[Reading]:
        """Rate the candidates of each graph of a batch without dropout, with the uncertainty of that.

        Args:
            graph: As for :meth:`forward`.

        Raises:
            ConfigError: As for :meth:`forward`.
        """
        batch, num_graphs = graph.candidate_batch, len(graph.global_features)
        if self.config.enable_uncertainty:
            output, samples = self.sample(graph)
            epistemic, aleatoric, spread = measure_uncertainty(
                samples, graph.candidate_mask, batch, num_graphs
            )
            novelty = self.novelty(graph)
        else:
            flow, rows = self._flow(graph)
            h = self._through(graph.x, flow, rows, None, 0, len(self.layers) + 1)
            output = self._heads(graph, h, rows, None)
            spread = torch.zeros_like(output.logits)
            epistemic = aleatoric = novelty = torch.zeros_like(output.value)
        sizes = torch.bincount(batch, minlength=num_graphs).tolist()
        parts = zip(
            output.logits.split(sizes),
            output.risk.split(sizes),
            output.value.tolist(),
            output.urgency.tolist(),
            spread.split(sizes),
            epistemic.tolist(),
            aleatoric.tolist(),
            novelty.tolist(),
            strict=True,
        )
        return [Reading(*part) for part in parts]

    def distribution(self, output: PolicyOutput, graph: CandidateGraph) -> CandidateDistribution:
        """The distribution over available candidates that the preferences mean."""
        return CandidateDistribution(
            output.logits, graph.candidate_mask, graph.candidate_batch, len(graph.global_features)
        )

    def _through(
        self, h: Tensor, flow: Flow, rows: Rows, noise: Noise | None, start: int, end: int
    ) -> Tensor:
        """Pass the encoder (stage 0) and graph layers (from stage 1) from stage ``start`` to before ``end``."""
        for stage in range(start, end):
            h = self.encoder(h, rows, noise) if stage == 0 else self.layers[stage - 1](h, flow, rows, noise)
        return h

    def _embed(
        self, graph: CandidateGraph, h: Tensor, rows: Rows, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        """Candidates [C, ..., H] and graphs [B, ..., H], from nodes [N, ..., H]."""
        h = self.node_norm(h)
        pooled = pool(h, rows)
        run = like(graph.global_features, pooled).expand(*pooled.shape[:-1], -1)
        context = self.context(torch.cat([pooled, run], -1)).relu()
        graphs = Rows(torch.arange(rows.num_graphs, device=h.device), rows.num_graphs)
        context = self.head_dropout(context, graphs, noise)
        source, target = graph.placement_index
        placed = self.placement(h, h, source, target)
        placed = scatter(placed, graph.placement_candidate, 0, len(graph.candidate_attr), "mean")
        own = like(self.candidate(graph.candidate_attr), placed)
        candidates = Rows(graph.candidate_batch, rows.num_graphs)
        z = self.head_dropout(self.candidate_norm(placed + own).relu(), candidates, noise)
        return z, context

    def _logits(self, graph: CandidateGraph, z: Tensor, context: Tensor) -> Tensor:
        logits: Tensor = self.logit_head(z, context, None, graph.candidate_batch).squeeze(-1)
        return logits

    def _heads(self, graph: CandidateGraph, h: Tensor, rows: Rows, noise: Noise | None) -> PolicyOutput:
        """Outputs from embeddings of nodes [N, H]."""
        z, context = self._embed(graph, h, rows, noise)
        available = graph.candidate_mask
        offered = pool(z[available], Rows(graph.candidate_batch[available], rows.num_graphs))
        value, urgency = self.graph_head(torch.cat([context, offered], -1)).unbind(-1)
        risk = self.risk_head(z, context, None, graph.candidate_batch).squeeze(-1).sigmoid()
        return PolicyOutput(
            logits=self._logits(graph, z, context),
            value=value,
            urgency=F.softplus(urgency),
            risk=risk.masked_fill(_first_of_each(graph.candidate_batch), 0.0),
        )

    def _flow(self, graph: CandidateGraph) -> tuple[Flow, Rows]:
        self._check(graph)
        num_nodes = len(graph.x)
        of_node = graph.batch
        if of_node is None:
            of_node = torch.zeros(num_nodes, dtype=torch.long, device=graph.x.device)
        flow = Flow.both_ways(graph.edge_index, graph.edge_attr, num_nodes)
        return flow, Rows(of_node, len(graph.global_features))

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
