"""The masked categorical over segments, against torch's own for each graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esper.tamiyo.network.distribution import CandidateDistribution

SIZES = [3, 1, 5]
BATCH = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
MASK = torch.tensor([True, False, True, True, True, True, True, False, True])


def logits(seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(len(BATCH), generator=torch.Generator().manual_seed(seed))


def by_torch(values: Tensor) -> list[torch.distributions.Categorical]:
    masked = torch.where(MASK, values, torch.tensor(-1e9))
    return [torch.distributions.Categorical(logits=part) for part in masked.split(SIZES)]


def test_agrees_with_torch_graph_by_graph() -> None:
    values = logits()
    ours, theirs = CandidateDistribution(values, MASK, BATCH, 3), by_torch(values)
    torch.testing.assert_close(ours.probs, torch.cat([d.probs for d in theirs]))
    torch.testing.assert_close(ours.entropy, torch.stack([d.entropy() for d in theirs]))
    index = torch.tensor([2, 0, 4])
    expected = torch.stack([d.log_prob(i) for d, i in zip(theirs, index, strict=True)])
    torch.testing.assert_close(ours.log_prob(index), expected)
    assert ours.mode.tolist() == [int(d.probs.argmax()) for d in theirs]
    assert ours.num_available.tolist() == [2, 1, 4]


def test_gradients_agree_and_masked_logits_get_none() -> None:
    index = torch.tensor([2, 0, 4])
    ours_in, theirs_in = logits().requires_grad_(), logits().requires_grad_()
    ours = CandidateDistribution(ours_in, MASK, BATCH, 3)
    (ours.log_prob(index) + 0.3 * ours.entropy).sum().backward()
    parts = by_torch(theirs_in)
    loss = sum(d.log_prob(i) + 0.3 * d.entropy() for d, i in zip(parts, index, strict=True))
    loss.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    assert ours_in.grad is not None
    assert ours_in.grad[~MASK].tolist() == [0.0, 0.0]


def test_unavailable_candidates_have_no_probability_whatever_their_logit() -> None:
    values = torch.where(MASK, logits(scale=0.5), torch.tensor(math.inf))
    ours = CandidateDistribution(values, MASK, BATCH, 3)
    assert ours.log_prob(torch.tensor([1, 0, 3])).tolist()[0::2] == [-math.inf, -math.inf]
    assert torch.isfinite(ours.entropy).all()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([ours.sample(generator) for _ in range(200)])
    assert set(drawn[:, 0].tolist()) == {0, 2}
    assert set(drawn[:, 1].tolist()) == {0}
    assert 3 not in drawn[:, 2]


def test_samples_follow_the_probabilities_and_the_generator() -> None:
    values = logits(scale=1.0)
    ours = CandidateDistribution(values, MASK, BATCH, 3)
    repeated = CandidateDistribution(values.expand(20_000, -1), MASK, BATCH, 3)
    drawn = repeated.sample(torch.Generator().manual_seed(1))
    assert drawn.shape == (20_000, 3)
    share = torch.bincount(drawn[:, 2], minlength=5) / 20_000
    torch.testing.assert_close(share, ours.probs[4:], atol=0.015, rtol=0)
    again = repeated.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


def test_the_first_of_equally_likely_candidates_is_the_mode() -> None:
    ours = CandidateDistribution(torch.zeros(9), MASK, BATCH, 3)
    assert ours.mode.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(scale: float) -> None:
    values = logits(scale=scale).requires_grad_()
    ours = CandidateDistribution(values, MASK, BATCH, 3)
    ours.entropy.sum().backward()
    assert torch.isfinite(ours.entropy).all()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def test_normalised_entropy_is_one_when_all_are_alike_and_zero_for_one_candidate() -> None:
    ours = CandidateDistribution(torch.zeros(9), MASK, BATCH, 3)
    torch.testing.assert_close(ours.normalised_entropy, torch.tensor([1.0, 0.0, 1.0]))


def test_half_precision_is_worked_out_in_single() -> None:
    ours = CandidateDistribution(logits().half(), MASK, BATCH, 3)
    assert ours.probs.dtype == torch.float32


def test_a_candidate_is_named_by_its_place_within_its_graph() -> None:
    ours = CandidateDistribution(logits(), MASK, BATCH, 3)
    assert ours.flat(torch.tensor([2, 0, 4])).tolist() == [2, 3, 8]
