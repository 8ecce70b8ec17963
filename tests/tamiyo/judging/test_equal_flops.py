"""The number of steps that an arm may take for the FLOPs of its host."""

from __future__ import annotations

import pytest

from esper.tamiyo.judging.equal_flops import LEAST_STEPS, fit_steps


def fitted(cost: float, overhead: float, steps: int = 500) -> tuple[int, float, int]:
    """Steps, ratio and number of runs for an arm whose FLOPs are a line in its steps."""
    runs = []

    def run(taken: int) -> float:
        runs.append(taken)
        return (overhead + cost * taken) / steps

    found, ratio = fit_steps(run, lambda ratio: ratio, (overhead + cost * steps) / steps, steps)
    return found, ratio, len(runs)


@pytest.mark.parametrize(("cost", "overhead"), [(2.2, 0.0), (2.0, 60.0), (5.0, 100.0), (1.05, 3.0)])
def test_the_budget_is_met_within_a_per_cent(cost: float, overhead: float) -> None:
    steps, ratio, num_runs = fitted(cost, overhead)
    assert ratio == pytest.approx(1.0, abs=0.01)
    assert steps < 500
    assert num_runs <= 3


def test_what_spends_nothing_more_is_not_run_again() -> None:
    assert fitted(1.0, 2.0) == (500, pytest.approx(1.004), 0)


def test_where_the_budget_cannot_be_met_the_ratio_tells() -> None:
    steps, ratio, _ = fitted(1.0, 600.0)
    assert steps == LEAST_STEPS
    assert ratio > 1.2


def test_a_policy_that_decides_otherwise_in_a_shorter_run_ends_at_the_closest() -> None:
    steps, ratio = fit_steps(lambda taken: (3.0 if taken > 300 else 1.2) * taken / 500, lambda r: r, 3.0, 500)
    assert steps < 500
    assert ratio < 1.0 + 2 * 0.5
