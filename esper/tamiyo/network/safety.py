"""The safety regulariser: a loss for probability put on what ends in a cull or a rollback."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.errors import ConfigError
from esper.tamiyo.geometric import scatter
from esper.tamiyo.network.distribution import CandidateDistribution

__all__ = ["known_risk", "safety_penalty"]


def known_risk(predicted: Tensor, measured: Tensor) -> Tensor:
    """The measured risk where there is one, else the predicted one, without a gradient.

    A penalty may not be lowered by predicting less risk, so nothing flows back to the risk head: it learns
    from measurements alone.

    Args:
        predicted: Of the risk head [C].
        measured: 1 where a candidate ended in a cull or a rollback, 0 where it did not, NaN where nobody
            tried [C].
    """
    return torch.where(measured.isnan(), predicted.detach(), measured)


def safety_penalty(distribution: CandidateDistribution, risk: Tensor, margin: float) -> Tensor:
    """Probability on risky candidates, weighed by how far their risk exceeds the margin.

    ``mean over graphs of Σ_c π(c) · max(0, r_c − margin) / (1 − margin)``: 0 while all probability lies on
    candidates within the margin, 1 when it lies on certain failures. Unavailable candidates have π = 0.

    Args:
        distribution: π, over B graphs; the gradient reaches its logits.
        risk: r [C], from :func:`known_risk`; 0 for WAIT.
        margin: ``safety_margin``, in [0, 1).

    Raises:
        ConfigError: ``margin`` is out of range.
    """
    if not 0 <= margin < 1:
        raise ConfigError(f"safety_penalty: margin should lie in [0, 1), got {margin}")
    excess = (risk.detach() - margin).clamp(min=0) / (1 - margin)
    expected = scatter(
        distribution.probs * excess, distribution.candidate_batch, -1, distribution.num_graphs, "sum"
    )
    return expected.mean()
