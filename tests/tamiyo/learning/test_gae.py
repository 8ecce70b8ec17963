"""Generalised advantages, by hand and as torchrl computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate

from esper.errors import DataFormatError
from esper.tamiyo.learning.gae import gae


def test_two_decisions_by_hand():
    advantages, returns = gae(np.array([1.0, 2.0]), np.array([0.5, 1.5]), 4.0, gamma=0.5, gae_lambda=0.5)
    last = 2 + 0.5 * 4 - 1.5
    first = (1 + 0.5 * 1.5 - 0.5) + 0.25 * last
    assert advantages.tolist() == [first, last]
    assert returns.tolist() == [first + 0.5, last + 1.5]


@pytest.mark.parametrize("terminated", [True, False])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 0.0), (0.9, 1.0)])
def test_is_what_torchrl_computes(terminated: bool, gamma: float, gae_lambda: float):
    rng = np.random.default_rng(3)
    rewards, values, final = rng.normal(size=7), rng.normal(size=7), 0.0 if terminated else 1.3
    # torchrl wants the value of the next state even where the episode ended, and must not use it there
    following = np.append(values[1:], 99.0 if terminated else final)
    done = torch.zeros(7, 1, dtype=torch.bool)
    done[-1] = True
    theirs = generalized_advantage_estimate(
        gamma,
        gae_lambda,
        *(torch.from_numpy(a)[:, None] for a in (values, following, rewards)),
        done,
        done & terminated,
    )
    ours = gae(rewards, values, final, gamma=gamma, gae_lambda=gae_lambda)
    for mine, other in zip(ours, theirs, strict=True):
        # theirs discounts in float32
        np.testing.assert_allclose(mine, other.squeeze(1).numpy(), rtol=1e-5)


def test_lambda_one_is_the_discounted_return_less_the_baseline():
    rewards, values = np.array([1.0, 0.0, 3.0]), np.array([5.0, 6.0, 7.0])
    advantages, returns = gae(rewards, values, 0.0, gamma=0.5, gae_lambda=1.0)
    np.testing.assert_allclose(returns, [1 + 0.25 * 3, 0.5 * 3, 3])
    np.testing.assert_allclose(advantages, returns - values)


def test_nan_and_shapes_are_refused():
    one = np.ones(1)
    with pytest.raises(DataFormatError, match="NaN or inf at decision 1 of 2"):
        gae(np.array([1.0, np.nan]), np.ones(2), 0.0, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(DataFormatError, match="NaN or inf at decision 0"):
        gae(one, one, float("inf"), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(DataFormatError, match=r"got \(1,\) and \(2,\)"):
        gae(one, np.ones(2), 0.0, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(DataFormatError, match="T >= 1"):
        gae(np.empty(0), np.empty(0), 0.0, gamma=1.0, gae_lambda=1.0)
