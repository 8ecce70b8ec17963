"""Sizes and thresholds of the policy network."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esper.errors import ConfigError

__all__ = ["PolicyConfig"]


@dataclass(frozen=True)
class PolicyConfig:
    """How large the policy network is, and what its decisions have to clear.

    The fields up to ``safety_margin``, and their defaults, are the design document's.

    **Confidence** is the probability that acting beats WAIT, not that of one candidate among many: with
    thirty candidates of nearly equal worth each of them is unlikely, though growing at all is certain. With
    log-odds ``logit(c) − logit(WAIT)``, which by Luce's choice axiom (Bradley and Terry 1952) say how often
    ``c`` would be preferred if it and WAIT were all there is, it is the sigmoid of the best candidate's.
    The share of the distribution that is not WAIT would not do: it goes to one with the number of candidates,
    however bad they are.

    Attributes:
        node_feature_dim: Features of a layer.
        edge_feature_dim: Features of an edge of the data flow.
        hidden_dim: Width of the network.
        num_gnn_layers: Attention layers, and as many convolutions beside them.
        num_attention_heads: Of each attention layer; they divide ``hidden_dim``.
        attention_dropout: Share of attention weights dropped in training.
        enable_uncertainty: Sample the network with dropout at each decision, and ask how novel the state is.
            Without, no threshold on either applies, and odds are taken as they are.
        uncertainty_samples: Passes with dropout.
        epistemic_weight: Standard deviations over those passes that are taken off each candidate's log-odds
            against WAIT before the best one is chosen (a lower confidence bound).
        health_threshold: Health score below which a layer counts as ill. A candidate for an ill layer needs
            less confidence, in proportion down to one half at health 0: instability is never a reason to
            withhold help from the layer that has it.
        adaptation_confidence_threshold: Confidence that a candidate needs.
        uncertainty_threshold: Epistemic uncertainty in [0, 1] above which the network abstains.
        max_adaptations_per_epoch: Candidates chosen in one epoch; WAIT and hold do not count.
        safety_margin: Risk that costs nothing. Training penalises probability of riskier candidates
            (:mod:`esper.tamiyo.network.safety`), and one whose risk is above ``1 − safety_margin`` is refused.
        global_feature_dim: Features of the run.
        candidate_feature_dim: Features of a candidate.
        feature_dropout: Share of channels dropped in encoders and graph layers.
        head_dropout: Share of channels dropped in the heads.
        novelty_threshold: Novelty in [0, 1) above which the network abstains too (:mod:`esper.tamiyo.network.novelty`):
            0.1 is 11 % further from the training states than 95 % of the validation states are.
        num_sampled_layers: Last graph layers whose dropout is sampled for the uncertainty; if all, the encoder's
            is too. The heads' always is. Each layer beyond the first costs ``uncertainty_samples`` passes
            through one layer: at 1,000 layers that is most of the time of a decision.
    """

    node_feature_dim: int = 16
    edge_feature_dim: int = 8
    hidden_dim: int = 128
    num_gnn_layers: int = 4
    num_attention_heads: int = 4
    attention_dropout: float = 0.1
    enable_uncertainty: bool = True
    uncertainty_samples: int = 10
    epistemic_weight: float = 0.1
    health_threshold: float = 0.3
    adaptation_confidence_threshold: float = 0.75
    uncertainty_threshold: float = 0.2
    max_adaptations_per_epoch: int = 2
    safety_margin: float = 0.1
    global_feature_dim: int = 36
    candidate_feature_dim: int = 46
    feature_dropout: float = 0.1
    head_dropout: float = 0.2
    novelty_threshold: float = 0.1
    num_sampled_layers: int = 1

    def __post_init__(self) -> None:
        sizes = (
            "node_feature_dim",
            "edge_feature_dim",
            "hidden_dim",
            "num_gnn_layers",
            "num_attention_heads",
            "uncertainty_samples",
            "max_adaptations_per_epoch",
            "global_feature_dim",
            "candidate_feature_dim",
        )
        rates = ("attention_dropout", "feature_dropout", "head_dropout")
        shares = (
            "health_threshold",
            "adaptation_confidence_threshold",
            "uncertainty_threshold",
            "novelty_threshold",
            "safety_margin",
        )
        wrong = [f"{n} should be a whole number of at least 1" for n in sizes if not _whole(self, n, 1)]
        if not _whole(self, "num_sampled_layers", 0) or self.num_sampled_layers > self.num_gnn_layers:
            wrong.append("num_sampled_layers should lie in [0, num_gnn_layers]")
        if not wrong and self.hidden_dim % self.num_attention_heads:
            wrong.append("num_attention_heads should divide hidden_dim")
        wrong += [f"{name} should lie in [0, 1)" for name in rates if not 0 <= getattr(self, name) < 1]
        wrong += [f"{name} should lie in [0, 1]" for name in shares if not 0 <= getattr(self, name) <= 1]
        if not isinstance(self.enable_uncertainty, bool):
            wrong.append("enable_uncertainty should be true or false")
        if not 0 <= self.epistemic_weight < math.inf:
            wrong.append("epistemic_weight should be finite and not negative")
        if wrong:
            raise ConfigError(f"PolicyConfig: {'; '.join(wrong)}; got {self}")


def _whole(config: PolicyConfig, name: str, least: int) -> bool:
    value = getattr(config, name)
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
