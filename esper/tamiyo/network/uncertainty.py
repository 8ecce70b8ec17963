"""What dropout samples say of how much the network knows: mutual information and spread."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from esper.tamiyo.network.distribution import CandidateDistribution, log_available

__all__ = ["Uncertainty", "measure_uncertainty"]


class Uncertainty(NamedTuple):
    """Of each graph and candidate (``B``, ``C``).

    Attributes:
        epistemic: ``(H(mean p) − mean H(p)) / log K`` over samples [B], in [0, 1], K available candidates: how much
            the samples contradict one another (Houlsby et al. 2011; Gal et al. 2017). More data cure it.
        aleatoric: ``mean H(p) / log K`` [B], in [0, 1]: how undecided each sample is by itself.
        spread: Standard deviation over samples of a candidate's log-odds against WAIT [C].
    """

    epistemic: Tensor
    aleatoric: Tensor
    spread: Tensor


def measure_uncertainty(
    samples: Tensor, mask: Tensor, candidate_batch: Tensor, num_graphs: int
) -> Uncertainty:
    """Measure the uncertainty of candidates' logits.

    Args:
        samples: Logits of S passes with dropout [S, C].
        mask: Which candidates are available [C].
        candidate_batch: Graph of each candidate [C], ascending.
        num_graphs: B.
    """
    each = CandidateDistribution(samples, mask, candidate_batch, num_graphs)
    together = CandidateDistribution(each.probs.mean(0).log(), mask, candidate_batch, num_graphs)
    most = log_available(each.num_available)
    aleatoric = each.entropy.mean(0) / most
    # rounding leaves a little less than nothing where all samples agree
    epistemic = (together.entropy / most - aleatoric).clamp(min=0)
    wait = each.flat(candidate_batch.new_zeros(num_graphs))[candidate_batch]
    spread = (samples - samples[:, wait]).std(0, correction=0)
    return Uncertainty(epistemic, aleatoric, spread)
