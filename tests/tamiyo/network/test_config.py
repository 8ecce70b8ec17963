"""The design document's defaults, and values that will not do."""

from __future__ import annotations

import dataclasses

import pytest

from esper.errors import ConfigError
from esper.tamiyo.network.config import PolicyConfig

DOCUMENT = {
    "node_feature_dim": 16,
    "edge_feature_dim": 8,
    "hidden_dim": 128,
    "num_gnn_layers": 4,
    "num_attention_heads": 4,
    "attention_dropout": 0.1,
    "enable_uncertainty": True,
    "uncertainty_samples": 10,
    "epistemic_weight": 0.1,
    "health_threshold": 0.3,
    "adaptation_confidence_threshold": 0.75,
    "uncertainty_threshold": 0.2,
    "max_adaptations_per_epoch": 2,
    "safety_margin": 0.1,
}


def test_the_documents_defaults() -> None:
    config = dataclasses.asdict(PolicyConfig())
    assert {name: config[name] for name in DOCUMENT} == DOCUMENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim should be a whole number"),
        ({"num_gnn_layers": 1.5}, "num_gnn_layers should be a whole number"),
        ({"uncertainty_samples": True}, "uncertainty_samples should be a whole number"),
        ({"hidden_dim": 30}, "num_attention_heads should divide hidden_dim"),
        ({"attention_dropout": 1.0}, r"attention_dropout should lie in \[0, 1\)"),
        ({"head_dropout": -0.1}, r"head_dropout should lie in \[0, 1\)"),
        ({"adaptation_confidence_threshold": 1.2}, "adaptation_confidence_threshold should lie in"),
        ({"safety_margin": float("nan")}, "safety_margin should lie in"),
        ({"epistemic_weight": float("inf")}, "epistemic_weight should be finite"),
        ({"enable_uncertainty": 1}, "enable_uncertainty should be true or false"),
        ({"num_sampled_layers": 5}, "num_sampled_layers should lie in"),
    ],
)
def test_values_that_will_not_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**changes)  # type: ignore[arg-type]
