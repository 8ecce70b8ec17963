"""The collector rests while a host is attached to, and runs again afterwards as it did."""

from __future__ import annotations

import gc

import pytest

from esper.kasmina.garbage import uncollected


def test_no_cycle_is_collected_inside_and_the_setting_comes_back():
    before = sum(generation["collections"] for generation in gc.get_stats())
    with uncollected():
        kept = [[] for _ in range(5000)]
        assert sum(generation["collections"] for generation in gc.get_stats()) == before
        assert not gc.isenabled()
    assert gc.isenabled()
    assert len(kept) == 5000


def test_a_collector_that_was_off_stays_off_and_an_error_passes():
    gc.disable()
    try:
        with pytest.raises(ValueError, match="inside"), uncollected():
            raise ValueError("inside")
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="inside"), uncollected():
        raise ValueError("inside")
    assert gc.isenabled()
