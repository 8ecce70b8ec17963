"""Shaping leaves the best policy the best; a bonus that is no potential does not."""

from __future__ import annotations

import numpy as np
import pytest

from esper.errors import ConfigError
from esper.tamiyo.graph.facts import RunFacts
from esper.tamiyo.rewards import RewardConfig
from esper.tamiyo.rewards.shaping import potential, shape, shaping

GAMMA = 0.9
# Decide three times to wait (0) or to grow (1): state = (time, seeds grown), the end is absorbing. One seed pays
# at the end, two cost more than they bring.
TIMES, SEEDS = 3, 4
FINAL = np.array([0.0, 1.0, 0.2, -0.5])


def q_values(extra) -> np.ndarray:
    """Q [time, seeds, action] by backward induction, with ``extra(before, after, ended)`` added to each reward."""
    q = np.zeros((TIMES, SEEDS, 2))
    value = np.zeros((TIMES + 1, SEEDS))
    for time in reversed(range(TIMES)):
        for seeds in range(SEEDS):
            for action in (0, 1):
                after = min(SEEDS - 1, seeds + action)
                ended = time == TIMES - 1
                reward = (FINAL[after] if ended else 0.0) - 0.05 * action
                reward += extra((time, seeds), (time + 1, after), ended)
                q[time, seeds, action] = reward + (0.0 if ended else GAMMA * value[time + 1, after])
        value[time] = q[time].max(axis=1)
    return q


def test_shaping_by_a_potential_keeps_every_best_action():
    phi = np.random.default_rng(0).normal(0, 3, (TIMES + 1, SEEDS))
    plain = q_values(lambda before, after, ended: 0.0)
    shaped = q_values(
        lambda before, after, ended: shaping(phi[before], phi[after], gamma=GAMMA, terminated=ended)
    )
    np.testing.assert_allclose(shaped, plain - phi[:TIMES, :, None], atol=1e-12)  # Ng et al. 1999, eq. 3
    assert (shaped.argmax(axis=2) == plain.argmax(axis=2)).all()


def test_a_bonus_for_germinating_changes_the_best_policy():
    plain = q_values(lambda before, after, ended: 0.0)
    bribed = q_values(lambda before, after, ended: 0.9 if after[1] > before[1] else 0.0)
    assert (bribed.argmax(axis=2) != plain.argmax(axis=2)).any()


def test_shaping_telescopes_over_an_episode():
    potentials = [0.3, -0.8, 0.1, 0.6]
    shaped = shape([0.0, 0.0, 1.0], potentials, gamma=1.0, terminated=True)
    assert sum(shaped) == pytest.approx(1.0 - potentials[0])
    cut_off = shape([0.0, 0.0, 1.0], potentials, gamma=1.0, terminated=False)
    assert sum(cut_off) == pytest.approx(1.0 + potentials[-1] - potentials[0])


def test_the_potential_follows_loss_and_size():
    config = RewardConfig()

    def phi(
        loss: float | None, parameters: int = 100, price: float = 0.1, losses: tuple[float, ...] = ()
    ) -> float:
        return potential(
            RunFacts(
                run_id="r", step=1, total_steps=10, epoch=0, host_parameters=100, num_parameters=parameters,
                parameters_left=0, flops_left=0.0, germinations_left=0, tokens_per_parameter=1.0, transformer=False,
                window_open=True, price=price, held_out_loss=loss, train_losses=losses,
            ),
            config,
        )  # fmt: skip

    assert phi(0.5) > phi(0.6) > phi(2.0) > phi(None) == phi(float("nan")) == -config.accuracy
    assert phi(0.5) > phi(0.5, 200) > phi(0.5, 200, price=0.3)
    assert phi(None, losses=(2.0, 0.5)) == phi(0.5)


def test_wrong_potentials_are_refused():
    with pytest.raises(ConfigError, match="expected 2 potentials for 1 rewards, got 1"):
        shape([1.0], [0.0], gamma=0.9, terminated=True)
    with pytest.raises(ConfigError, match="finite potentials"):
        shape([1.0], [0.0, float("inf")], gamma=0.9, terminated=True)
