"""One masked categorical distribution over the candidates of each graph of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.tamiyo.geometric import scatter

__all__ = ["CandidateDistribution", "log_available"]


class CandidateDistribution:
    """Which candidate each graph chooses, among those that are available.

    Graphs have different numbers of candidates, so the distributions lie behind one another in one vector
    (B graphs, C candidates in all, S samples). A candidate is named by its place **within its graph**: 0 is
    WAIT, whatever the graph is batched with. Work is done in float32 or better.

    Args:
        logits: [C], or [S, C] for S distributions over the same candidates.
        mask: Which candidates are available [C], bool; at least one of each graph.
        candidate_batch: Graph of each candidate [C], ascending.
        num_graphs: B.

    Attributes:
        logprobs: Normalised log-probabilities [..., C]; −inf where unavailable.
        probs: Probabilities [..., C]; 0 where unavailable.
        num_available: Available candidates of each graph [B].
    """

    def __init__(self, logits: Tensor, mask: Tensor, candidate_batch: Tensor, num_graphs: int) -> None:
        assert logits.shape[-1:] == mask.shape == candidate_batch.shape
        self.mask = mask
        self.candidate_batch = candidate_batch
        self.num_graphs = num_graphs
        self.num_available = self._sum(mask.long())
        sizes = self._sum(torch.ones_like(mask, dtype=torch.long))
        self._starts = sizes.cumsum(0) - sizes
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        # finite stand-ins for what is masked keep NaN out of the gradients
        logits = torch.where(mask, logits, torch.zeros_like(logits))
        lowest = torch.finfo(logits.dtype).min
        highest = self._reduce(logits.detach().masked_fill(~mask, lowest), "max")
        shifted = logits - highest[..., candidate_batch]
        weights = torch.where(mask, shifted, torch.zeros_like(shifted)).exp() * mask
        self._log_p = torch.where(
            mask, shifted - self._sum(weights).clamp(min=1e-38).log()[..., candidate_batch], 0.0
        )
        self.logprobs = self._log_p.masked_fill(~mask, -math.inf)
        self.probs = self._log_p.exp() * mask

    def log_prob(self, index: Tensor) -> Tensor:
        """Log-probability [..., B] of candidate ``index`` [B] of each graph; −inf for an unavailable one."""
        return self.logprobs[..., self.flat(index)]

    def flat(self, index: Tensor) -> Tensor:
        """Place [B] among all C candidates of candidate ``index`` [B] of each graph."""
        return self._starts + index

    @property
    def entropy(self) -> Tensor:
        """Entropy over the available candidates of each graph [..., B], in nats."""
        return -self._sum(self.probs * self._log_p)

    @property
    def normalised_entropy(self) -> Tensor:
        """Entropy over its largest value, log(available) [..., B]; 0 where only one candidate is available."""
        return self.entropy / log_available(self.num_available)

    @property
    def mode(self) -> Tensor:
        """Likeliest candidate of each graph [..., B]; of equally likely ones the first."""
        return self._argmax(self.logprobs)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a candidate for each graph [..., B] by the Gumbel-max trick.

        Args:
            generator: On the device of the logits; None for torch's global one.
        """
        uniform = torch.rand(
            self.logprobs.shape,
            generator=generator,
            dtype=self.logprobs.dtype,
            device=self.logprobs.device,
        )
        tiny = torch.finfo(uniform.dtype).tiny
        noise = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        return self._argmax(self.logprobs.detach() + noise)

    def _argmax(self, values: Tensor) -> Tensor:
        best = self._reduce(values, "max")
        place = torch.arange(values.shape[-1], device=values.device) - self._starts[self.candidate_batch]
        is_best = values == best[..., self.candidate_batch]
        return self._reduce(torch.where(is_best, place, values.shape[-1]), "min")

    def _sum(self, values: Tensor) -> Tensor:
        return self._reduce(values, "sum")

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        reduced: Tensor = scatter(values, self.candidate_batch, values.dim() - 1, self.num_graphs, how)
        return reduced


def log_available(num_available: Tensor) -> Tensor:
    """log of the number of available candidates [B], 1 instead of 0 where there is one (its entropy is 0)."""
    logs = num_available.to(torch.get_default_dtype()).log()
    return torch.where(num_available > 1, logs, torch.ones_like(logs))
