from __future__ import annotations

import math

import pytest

from esper.report import units
from esper.report.units import DASH


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_999, "1.00 M"), (12.34e9, "12.3 G"), (4.56e14, "456 T"),
     (math.inf, "inf"), (None, DASH)],
)  # fmt: skip
def test_scaled(value, text):
    assert units.scaled(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.1, "8.1 s"),
        (59.97, "1 m 00 s"),
        (207, "3 m 27 s"),
        (7500, "2 h 05 m"),
        (None, DASH),
        (math.nan, "nan"),
    ],
)
def test_duration(value, text):
    assert units.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (0, "0.0000"),
                        (12.3456, "12.346"), (1.2e-5, "1.2e-05"), (math.nan, "nan"),
                        (math.inf, "inf"), (1e9, "1e+09"), (None, DASH)]
)  # fmt: skip
def test_loss(value, text):
    assert units.loss(value) == text


def test_the_rest():
    assert (units.number(120.0), units.number(1.2e-5), units.number(math.nan)) == ("120", "1.2e-05", "nan")
    assert (units.percent(0.957), units.percent(None), units.count(12345), units.count(None)) == (
        "95.7 %", DASH, "12,345", DASH,
    )  # fmt: skip
