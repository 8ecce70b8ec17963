"""Layers of the policy network: dropout of whole channels, attention with edge features, the graph layer.

Shape legend: ``N`` nodes, ``E`` edges, ``R`` rows (of nodes, candidates or graphs), ``B`` graphs, ``H`` channels,
``S`` samples. Every layer maps rows along dimension 0 and channels along the last one. Where uncertainty is
sampled, samples lie between them from the first dropout on: [R, H] before, [R, S, H] behind, so that what
comes before it is passed through once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.tamiyo.geometric import GCNConv, gcn_norm, scatter, softmax

__all__ = [
    "AttentionConv",
    "ChannelDropout",
    "Flow",
    "GraphLayer",
    "Noise",
    "PairMLP",
    "Rows",
    "like",
    "mlp",
    "pool",
]


@dataclass(frozen=True)
class Rows:
    """Which graph each row of a tensor belongs to.

    Attributes:
        graph: [R].
        num_graphs: B.
    """

    graph: Tensor
    num_graphs: int


@dataclass(frozen=True)
class Noise:
    """What dropout draws its masks from. Layers are told, and do not look at ``training``: a decision is made
    without noise, and its uncertainty sampled, whatever mode the network is in.

    Attributes:
        generator: Samples the uncertainty: S masks of channels. None in training: torch's global random
            numbers, a mask for each graph, and attention weights dropped too.
        num_samples: S, with a generator.
    """

    generator: torch.Generator | None = None
    num_samples: int = 1


@dataclass(frozen=True)
class Flow:
    """Data flow in both directions, so that a layer hears from those it feeds too.

    Attributes:
        edge_index: Every edge and its reverse [2, 2E].
        edge_attr: Their features and which way they run [2E, F + 1].
        gcn_index: The same edges and a loop at each node [2, 2E + N].
        gcn_weight: Symmetric normalisation of those [2E + N] (Kipf and Welling 2017, eq. 2).
    """

    edge_index: Tensor
    edge_attr: Tensor
    gcn_index: Tensor
    gcn_weight: Tensor

    @staticmethod
    def both_ways(edge_index: Tensor, edge_attr: Tensor, num_nodes: int) -> Flow:
        """Add the reverse of every edge; the last feature tells it from the edge."""
        index = torch.cat([edge_index, edge_index.flip(0)], 1)
        forward = F.pad(edge_attr, (0, 1), value=0.0)
        attr = torch.cat([forward, F.pad(edge_attr, (0, 1), value=1.0)])
        gcn_index, gcn_weight = gcn_norm(index, None, num_nodes, dtype=edge_attr.dtype)
        return Flow(index, attr, gcn_index, gcn_weight)


class ChannelDropout(nn.Module):
    """Drop whole channels: one mask for all rows of a graph.

    Each pass is then one draw of the network that sees every node alike, as variational dropout asks for (Gal
    and Ghahramani 2016). Masks drawn anew for every node would average out where nodes are pooled, and make
    a graph's uncertainty depend on the order of its nodes.

    In training each graph of a batch draws its own mask. Where uncertainty is sampled each of S samples draws
    one mask for all graphs, so that a graph's samples do not depend on what it is batched with.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rows: Rows, noise: Noise | None) -> Tensor:
        """Drop channels of ``x`` [R, H]; to [R, S, H] where uncertainty is sampled; nothing without noise."""
        if self.p == 0 or noise is None:
            return x
        if noise.generator is not None:
            shape = (noise.num_samples, x.shape[-1])
            keep = torch.rand(shape, generator=noise.generator, device=x.device) >= self.p
            x = x.unsqueeze(1) if x.dim() == 2 else x
        else:
            keep = (torch.rand(rows.num_graphs, x.shape[-1], device=x.device) >= self.p)[rows.graph]
        return x * (keep.to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class AttentionConv(nn.Module):
    """Multi-head attention of nodes to their neighbours, with edge features.

    ``x_i' = W_s x_i + Σ_j α_ij (W_v x_j + W_e e_ij)`` with
    ``α_ij = softmax_j((W_q x_i)·(W_k x_j + W_e e_ij) / √d)``, heads side by side (Shi et al. 2021, eqs. 3-4).
    The same as torch-geometric's ``TransformerConv``, and tested against it; that one takes no samples
    between rows and channels, and projects edges once for each of them.

    Args:
        hidden_dim: H, in and out.
        edge_dim: Edge features.
        num_heads: Divides H.
        dropout: Share of the weights α dropped in training.
    """

    def __init__(self, hidden_dim: int, edge_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(hidden_dim, hidden_dim)
        self.value = nn.Linear(hidden_dim, hidden_dim)
        self.edge = nn.Linear(edge_dim, hidden_dim, bias=False)
        self.skip = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, noise: Noise | None = None) -> Tensor:
        """Map nodes [N, H] or [N, S, H] to the same shape."""
        source, target = edge_index
        heads, size = self.num_heads, x.shape[-1] // self.num_heads
        # [2E, 1 or nothing, heads, size]: the same for every sample
        edge = self.edge(edge_attr).view(-1, *[1] * (x.dim() - 2), heads, size)
        query = self.query(x).unflatten(-1, (heads, size)).index_select(0, target)
        key = self.key(x).unflatten(-1, (heads, size)).index_select(0, source) + edge
        value = self.value(x).unflatten(-1, (heads, size)).index_select(0, source) + edge
        scores = (query * key).sum(-1) / math.sqrt(size)
        weights = softmax(scores, target, num_nodes=len(x))
        training = noise is not None and noise.generator is None
        weights = F.dropout(weights, self.dropout, training)
        messages = (value * weights.unsqueeze(-1)).flatten(-2)
        return cast(Tensor, self.skip(x)).index_add(0, target, messages)


class _Convolution(GCNConv):
    """A graph convolution that takes samples between rows and channels."""

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """Weigh neighbours [2E + N, ..., H]."""
        return edge_weight.view(-1, *[1] * (x_j.dim() - 1)) * x_j


class GraphLayer(nn.Module):
    """Attention and convolution side by side, gated together, added to what came in.

    ``h' = h + dropout(relu(g ⊙ attention(norm(h)) + (1 − g) ⊙ convolution(norm(h))))`` with the gate
    ``g = sigmoid(W [attention, convolution])`` for each node and channel.

    Args:
        hidden_dim: H.
        edge_dim: Edge features.
        num_heads: Of the attention.
        attention_dropout: Of its weights.
        feature_dropout: Of what is added.
    """

    def __init__(
        self,
        hidden_dim: int,
        edge_dim: int,
        num_heads: int,
        *,
        attention_dropout: float,
        feature_dropout: float,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.attention = AttentionConv(hidden_dim, edge_dim, num_heads, attention_dropout)
        self.convolution = _Convolution(hidden_dim, hidden_dim, normalize=False, node_dim=0)
        self.gate = nn.Linear(2 * hidden_dim, hidden_dim)
        self.dropout = ChannelDropout(feature_dropout)

    def forward(self, h: Tensor, flow: Flow, rows: Rows, noise: Noise | None) -> Tensor:
        """Map nodes [N, H], or [N, S, H]; to [N, S, H] where uncertainty is sampled."""
        x = self.norm(h)
        attended = self.attention(x, flow.edge_index, flow.edge_attr, noise)
        convolved = self.convolution(x, flow.gcn_index, flow.gcn_weight)
        gate = self.gate(torch.cat([attended, convolved], -1)).sigmoid()
        mixed = torch.lerp(convolved, attended, gate).relu()
        added = cast(Tensor, self.dropout(mixed, rows, noise))
        return like(h, added) + added


class PairMLP(nn.Module):
    """Two linear layers on pairs of rows: ``W (relu(A a_i + B b_j + c)) + d`` for each pair (i, j).

    The same as an MLP on rows laid side by side, but each row is multiplied once, however many pairs it is in.

    Args:
        hidden_dim: H, of both rows and between the layers.
        num_out: Outputs.
    """

    def __init__(self, hidden_dim: int, num_out: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_dim, hidden_dim)
        self.second = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, num_out)

    def forward(self, a: Tensor, b: Tensor, i: Tensor | None, j: Tensor) -> Tensor:
        """Map rows ``a`` [R, ..., H] and ``b`` [R', ..., H] to [pairs, ..., num_out].

        Args:
            a: First rows.
            b: Second rows.
            i: Which first row each pair has [pairs]; None for all in their order.
            j: Which second row [pairs].
        """
        return cast(Tensor, self.out((_picked(self.first, a, i) + _picked(self.second, b, j)).relu()))


def _picked(linear: nn.Linear, rows: Tensor, index: Tensor | None) -> Tensor:
    """``linear(rows)[index]``, by whichever order multiplies fewer rows."""
    if index is None:
        return cast(Tensor, linear(rows))
    if len(index) < len(rows):
        return cast(Tensor, linear(rows.index_select(0, index)))
    return cast(Tensor, linear(rows)).index_select(0, index)


def like(x: Tensor, other: Tensor) -> Tensor:
    """Make room for the samples that ``other`` has: [R, H] to [R, 1, H]."""
    return x.unsqueeze(1) if x.dim() < other.dim() else x


def mlp(num_in: int, hidden: int, num_out: int) -> nn.Sequential:
    """Two linear layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(num_in, hidden), nn.ReLU(), nn.Linear(hidden, num_out))


def pool(h: Tensor, rows: Rows) -> Tensor:
    """Mean and maximum of a graph's rows side by side [B, ..., 2H]; 0 for a graph without rows."""
    mean = scatter(h, rows.graph, 0, rows.num_graphs, "mean")
    return torch.cat([mean, scatter(h, rows.graph, 0, rows.num_graphs, "max")], -1)
