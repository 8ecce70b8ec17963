"""A policy network behind the service: the same choices alone and in company, a rule where it abstains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from service_points import make_point

from esper.errors import CheckpointError, ConfigError
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import save_network
from esper.tamiyo.service.deciders import make_decider
from esper.tamiyo.service.network_decider import NetworkDecider

SMALL = PolicyConfig(hidden_dim=16, num_gnn_layers=2, adaptation_confidence_threshold=0.0)
POINTS = [make_point("a", 3), make_point("b", 30, widths=(16, 16, 8, 16, 16, 3)), make_point("c", 60)]


def network(**changes: object) -> TamiyoNetwork:
    torch.manual_seed(1)
    return TamiyoNetwork(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]


def test_a_point_is_decided_alike_alone_and_with_others() -> None:
    decider = NetworkDecider(network(uncertainty_threshold=1.0))
    together = decider.choose(POINTS)
    for point, choice in zip(POINTS, together, strict=True):
        (alone,) = decider.choose([point])
        assert alone.candidate == choice.candidate
        assert alone.value == pytest.approx(choice.value, abs=1e-5)
        assert alone.uncertainty == pytest.approx(choice.uncertainty, abs=1e-5)
        said = decider.network.decide(ModelGraphBuilder().build(point)).decision
        assert choice.confidence == pytest.approx(said.confidence, abs=1e-5)
        assert not choice.problem(point)


def test_where_it_does_not_know_a_rule_decides_and_says_so() -> None:
    decider = NetworkDecider(network(uncertainty_threshold=0.0), fallback="cond(size=small, ratio=0.5)")
    choice = decider.choose(POINTS)[0]
    assert choice.abstained
    assert POINTS[0].candidates[choice.candidate].placements[0].source == "net.0"
    assert "cond(size=small, ratio=0.5) decides" in choice.reason


def test_weights_are_named_by_their_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_network(network(), path, card="Of a test.")
    decider = make_decider(str(path))
    assert (decider.name, decider.version) == ("tamiyo", "mine")
    with pytest.raises(CheckpointError, match="no policy network at"):
        make_decider(str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="expected a decider"):
        NetworkDecider(path, fallback="nobody")
