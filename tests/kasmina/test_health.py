"""The health score: in range, monotone, and zero when something is broken."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError
from esper.kasmina.health import UPDATE_BAND, WEIGHTS, health_score

fractions = st.floats(0.0, 1.0)
ratios = st.floats(0.0, 1e6)
statistics = st.fixed_dictionaries(
    {
        "dead_neuron_ratio": fractions,
        "dormancy": fractions,
        "rank_fraction": st.none() | fractions,
        "gradient_snr": st.none() | ratios,
        "update_ratio": st.none() | ratios,
        "error_count": st.integers(0, 3),
    }
)
LOW, HIGH = UPDATE_BAND


def test_a_sound_layer_is_at_one() -> None:
    assert health_score() == 1.0
    assert health_score(rank_fraction=0.5, gradient_snr=3.0, update_ratio=1e-3) == 1.0
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)


def test_formula_by_hand() -> None:
    value = health_score(
        dead_neuron_ratio=0.5, dormancy=0.6, rank_fraction=0.125, gradient_snr=0.2, update_ratio=1e-6
    )
    assert value == pytest.approx(0.5**0.3 * 0.4**0.25 * 0.5**0.2 * 0.2**0.15 * (2 / 3) ** 0.1)


def test_errors_or_all_units_dead_give_zero() -> None:
    assert health_score(error_count=1) == 0.0
    assert health_score(dead_neuron_ratio=1.0) == 0.0


@given(statistics)
def test_in_the_unit_interval(values: dict[str, Any]) -> None:
    assert 0.0 <= health_score(**values) <= 1.0


@pytest.mark.parametrize(
    ("name", "strategy", "sign"),
    [
        ("dead_neuron_ratio", fractions, -1),
        ("dormancy", fractions, -1),
        ("rank_fraction", fractions, 1),
        ("gradient_snr", ratios, 1),
        ("error_count", st.integers(0, 5), -1),
        ("update_ratio", st.floats(0.0, HIGH), 1),
        ("update_ratio", st.floats(LOW, 1e6), -1),
    ],
)
@given(data=st.data(), values=statistics)
def test_monotone_in_each_argument(
    data: st.DataObject, values: dict[str, Any], name: str, strategy: st.SearchStrategy[float], sign: int
) -> None:
    smaller, larger = sorted([data.draw(strategy), data.draw(strategy)])
    before, after = (health_score(**values | {name: value}) for value in (smaller, larger))
    assert sign * (after - before) >= -1e-12


@pytest.mark.parametrize("name", ["dead_neuron_ratio", "dormancy", "rank_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_refuses_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"expected {name} in \[0, 1\]"):
        health_score(**{name: value})
