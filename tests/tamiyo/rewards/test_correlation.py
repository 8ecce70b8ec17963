"""Rank correlations of reward components with the end of the run."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from esper.tamiyo.rewards import HorizonReward, Reward
from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS
from esper.tamiyo.rewards.correlation import correlations, spearman


def reward(short_accuracy: float, short_speed: float, utility: float, provenance: str = "control") -> Reward:
    zeros = dict.fromkeys(COMPONENTS, 0.0)
    at = HorizonReward(step=10, total=0.0, components=zeros, utility=0.0)
    early = HorizonReward(
        step=5,
        total=short_accuracy,
        components=zeros | {"accuracy": short_accuracy, "speed": short_speed},
        utility=0.0,
    )
    late = HorizonReward(step=20, total=utility, components=zeros | {"accuracy": utility}, utility=utility)
    return Reward(
        total=utility, utility=utility, horizons={"short": early, "medium": at, "long": late}, provenance=provenance,
        final=True,
    )  # fmt: skip


def test_spearman_is_scipys_with_ties():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, 40).astype(float)
    y = x + generator.normal(0, 2, 40)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.ones(1), np.ones(1)) is None


def test_what_foretells_the_end_is_told_from_what_does_not():
    generator = np.random.default_rng(0)
    rows = []
    for run in range(30):
        for _ in range(4):
            utility = float(generator.normal())
            rows.append(
                (
                    f"run{run}",
                    reward(utility + float(generator.normal(0, 0.3)), float(generator.normal()), utility),
                )
            )
    rows.append(("run0", reward(9.0, 9.0, -9.0, provenance="itself")))  # WAIT is not counted
    found = {(c.component, c.horizon): c for c in correlations(rows)}
    assert len(found) == (len(COMPONENTS) + 1) * len(HORIZONS)
    good, blind, constant = found["accuracy", "short"], found["speed", "short"], found["memory", "short"]
    assert (good.count, good.num_runs) == (120, 30)
    assert good.rho is not None
    assert good.low is not None
    assert good.rho > good.low > 0.8
    assert blind.low is not None
    assert blind.high is not None
    assert blind.low < 0 < blind.high
    assert (constant.rho, constant.low, constant.high) == (None, None, None)
    assert correlations(rows) == list(found.values())  # the same resamples every time


def test_a_single_run_is_resampled_by_its_decisions_and_none_gives_nothing():
    rows = [("run", reward(i / 10, 0.0, i / 10)) for i in range(8)]
    good = correlations(rows)[0]
    assert (good.rho, good.num_runs) == (1.0, 1)
    assert good.low == pytest.approx(1.0)
    assert {c.rho for c in correlations([])} == {None}
    assert {c.rho for c in correlations(rows[:4])} == {None}  # too few to tell anything
