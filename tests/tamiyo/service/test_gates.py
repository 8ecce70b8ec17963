"""The gates: what they stop, and that a run in trouble is not refused for being in trouble."""

from __future__ import annotations

import math

import pytest
from service_points import make_point

from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.deciders import Choice
from esper.tamiyo.service.gates import Cadence, closed_gate, measurement_noise

GROW, RECYCLE = 1, 4
CONFIG = ServiceConfig(
    cooldown_s=30, max_adaptations=2, rate_window_s=100, min_confidence=0.6, max_uncertainty=0.3
)
NOISY = (2.0, 0.5, 3.0, 0.4, 2.5, 0.6)


def gate(choice: Choice, *, losses: tuple[float, ...] = (2.0, 1.9, 1.8, 1.7), at: dict[str, float] | None = None,
         now: float = 1000.0) -> str:  # fmt: skip
    cadence = Cadence(dict(at or {}))
    return closed_gate(make_point(losses=losses), choice, cadence, CONFIG, now)[0]


@pytest.mark.parametrize(
    ("choice", "closed"),
    [
        (Choice(GROW, ""), ""),
        (Choice(GROW, "", confidence=0.59), "confidence"),
        (Choice(GROW, "", uncertainty=0.31), "uncertainty"),
        (Choice(0, "", confidence=0.1, uncertainty=1.0), ""),
    ],
)
def test_a_choice_needs_confidence_and_knowledge(choice: Choice, closed: str) -> None:
    assert gate(choice) == closed


def test_a_run_cools_down_after_what_adds_units() -> None:
    assert gate(Choice(GROW, ""), at={"a": 971.0}) == "cooldown"
    assert gate(Choice(RECYCLE, ""), at={"a": 971.0}) == "cooldown"
    assert gate(Choice(GROW, ""), at={"a": 969.0}) == ""


def test_adaptations_are_limited_within_a_window() -> None:
    assert gate(Choice(GROW, ""), at={"a": 910.0, "b": 960.0}) == "rate"
    assert gate(Choice(GROW, ""), at={"a": 899.0, "b": 960.0}) == ""


def test_an_adaptation_that_was_undone_does_not_count() -> None:
    cadence = Cadence()
    cadence.note("a", make_point().candidates[GROW], 990.0)
    cadence.note("b", make_point().candidates[0], 991.0)
    assert list(cadence.adapted_at) == ["a"]
    cadence.undo("a")
    assert closed_gate(make_point(), Choice(GROW, ""), cadence, CONFIG, 1000.0) == ("", "")


@pytest.mark.parametrize(
    "losses",
    [
        (8.0, 8.1, 8.0, 8.1, 8.0),  # bad, and stays so
        (1.0, 1.5, 2.2, 3.2, 4.8),  # rising faster and faster
        (1.0, 1.0, 1.0, 6.0, 6.0, 6.0, 6.0),  # the data have shifted
        (1.0, 1.1, math.nan, 1.3, 1.4),  # one step has failed
    ],
)
def test_a_run_in_trouble_gets_help(losses: tuple[float, ...]) -> None:
    assert gate(Choice(GROW, ""), losses=losses) == ""


def test_measurements_that_tell_nothing_close_the_gate() -> None:
    assert gate(Choice(GROW, ""), losses=NOISY) == "noise"
    assert "scatter by" in closed_gate(make_point(losses=NOISY), Choice(GROW, ""), Cadence(), CONFIG, 0.0)[1]
    assert measurement_noise(NOISY[:3]) == 0.0


def test_noise_is_scatter_over_level_whatever_the_trend() -> None:
    assert measurement_noise([5.0 - 0.5 * i for i in range(8)]) == pytest.approx(0.0, abs=1e-12)
    small, large = ([level + 0.1 * (-1) ** i for i in range(20)] for level in (1.0, 10.0))
    assert measurement_noise(small) == pytest.approx(10 * measurement_noise(large), rel=1e-6)
