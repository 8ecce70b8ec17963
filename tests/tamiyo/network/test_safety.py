"""The safety regulariser: its formula, its gradient, and where risk comes from."""

from __future__ import annotations

import math

import pytest
import torch

from esper.errors import ConfigError
from esper.tamiyo.network.distribution import CandidateDistribution
from esper.tamiyo.network.safety import known_risk, safety_penalty

BATCH = torch.tensor([0, 0, 0, 1, 1])
MASK = torch.tensor([True, True, True, True, False])


def distribution(logits: torch.Tensor) -> CandidateDistribution:
    return CandidateDistribution(logits, MASK, BATCH, 2)


def test_formula() -> None:
    risk = torch.tensor([0.0, 0.5, 0.05, 0.0, 1.0])
    expected = ((1 / 3) * (0.5 - 0.1) / 0.9 + 0.0) / 2
    assert float(safety_penalty(distribution(torch.zeros(5)), risk, 0.1)) == pytest.approx(expected)


def test_gradient_moves_probability_away_from_what_is_risky() -> None:
    logits = torch.zeros(5, requires_grad=True)
    risk = torch.tensor([0.0, 0.9, 0.1, 0.0, 1.0], requires_grad=True)
    safety_penalty(distribution(logits), risk, 0.1).backward()
    assert logits.grad is not None
    assert logits.grad[1] > 0
    assert logits.grad[0] < 0
    assert logits.grad[4] == 0
    assert risk.grad is None


def test_within_the_margin_nothing_is_paid() -> None:
    risk = torch.full((5,), 0.3)
    assert float(safety_penalty(distribution(torch.zeros(5)), risk, 0.3)) == 0.0


def test_measured_risk_goes_before_predicted() -> None:
    predicted = torch.tensor([0.2, 0.3], requires_grad=True)
    known = known_risk(predicted, torch.tensor([1.0, math.nan]))
    assert known.tolist() == pytest.approx([1.0, 0.3])
    assert not known.requires_grad


def test_margin_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="margin should lie in"):
        safety_penalty(distribution(torch.zeros(5)), torch.zeros(5), 1.0)
