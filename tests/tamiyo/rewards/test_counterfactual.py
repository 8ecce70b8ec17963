"""Extrapolated loss curves: found again where the truth is known, with errors that are honest."""

from __future__ import annotations

import numpy as np
import pytest
from loop import Loop

from esper.errors import ConfigError
from esper.tamiyo.evaluation import mean_loss
from esper.tamiyo.rewards import Branch
from esper.tamiyo.rewards.counterfactual import fit_curve, fitted_control

STEPS = list(range(10, 310, 10))


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_a_power_law_without_noise_is_continued_exactly(exponent: float):
    def law(t: np.ndarray) -> np.ndarray:
        return 2.0 - 0.2 * np.log(t) if exponent == 0 else 0.4 + 3.0 * t**-exponent

    curve = fit_curve(STEPS, list(law(np.array(STEPS, float))))
    assert curve is not None
    predicted, error = curve.predict([600])
    assert predicted[0] == pytest.approx(law(np.array([600.0]))[0], abs=1e-6)
    assert error[0] < 1e-6


def test_prediction_intervals_hold_what_they_promise():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        a, b, c = generator.uniform(0.1, 1), generator.uniform(1, 4), generator.uniform(0.2, 1.2)
        t = np.array([*STEPS, 450])
        losses = a + b * t**-c + generator.normal(0, 0.02, len(t))
        curve = fit_curve(STEPS, list(losses[:-1]))
        assert curve is not None
        low, high = curve.interval([450], level=0.9)
        inside += bool(low[0] <= losses[-1] <= high[0])
    assert 85 <= inside <= 100


def test_a_real_training_is_foretold_within_its_interval():
    loop = Loop(total_steps=240, lr=0.003)
    losses = []
    for _ in range(24):
        loop.run(10)
        losses.append(mean_loss(loop.body, loop.held_out()))
    steps = list(range(10, 250, 10))
    curve = fit_curve(steps[:16], losses[:16])
    assert curve is not None
    low, high = curve.interval(steps[16:20], level=0.95)
    assert all(a <= loss <= b for a, loss, b in zip(low, losses[16:20], high, strict=True))


def test_the_error_grows_with_the_distance_and_with_the_backtest():
    generator = np.random.default_rng(1)
    t = np.array(STEPS)
    curve = fit_curve(STEPS, list(0.5 + 2 * t**-0.5 + generator.normal(0, 0.01, len(t))))
    assert curve is not None
    near, far = curve.predict([310, 3000])[1]
    assert far > near
    bent = fit_curve(STEPS, [1.0 if s < 200 else 0.5 for s in STEPS])  # a schedule dropped the learning rate
    assert bent is not None
    assert bent.predict([310])[1][0] >= bent.backtest > 0.2


def test_too_few_losses_give_no_curve():
    assert fit_curve(STEPS[:5], [1.0] * 5) is None
    assert fit_curve(STEPS[:8], [1.0] * 5 + [float("nan")] * 3) is None
    assert fit_curve(STEPS[:8], [1.0] * 8, min_points=9) is None
    with pytest.raises(ConfigError, match="one loss for each step"):
        fit_curve(STEPS, [1.0])


def test_a_flat_curve_and_one_from_step_zero_are_fitted():
    flat = fit_curve(STEPS, [0.7] * len(STEPS))
    assert flat is not None
    assert flat.predict([600])[0][0] == pytest.approx(0.7)
    assert fit_curve([0, *STEPS], [1.0, *(1 / np.array(STEPS))]) is not None


def test_the_fitted_control_starts_where_the_run_was_and_pays_as_before():
    t = np.array(STEPS)
    losses = 0.4 + 3.0 * t**-0.5
    taken = Branch(
        steps=(300, 400, 500), losses=(0.58, 0.3, 0.2), training_flops=(0, 9e3, 2e4), num_parameters=200
    )
    fitted = fitted_control(
        STEPS, list(losses), taken, flops_per_step=50.0, num_parameters=100, seconds_per_step=0.1
    )
    assert fitted is not None
    assert fitted.branch.steps == taken.steps
    assert (fitted.branch.losses[0], fitted.stderr[0]) == (0.58, 0.0)
    assert fitted.branch.losses[-1] == pytest.approx(0.4 + 3.0 * 500**-0.5, abs=1e-4)
    assert fitted.branch.training_flops == (0.0, 5e3, 1e4)
    assert fitted.branch.seconds == pytest.approx((0.0, 10.0, 20.0))
    assert fitted.branch.num_parameters == 100
    assert fitted_control(STEPS[:3], list(losses[:3]), taken, 50.0, 100) is None
