"""The soak benchmark runs and reports what it promises; and what its figures rest on."""

from __future__ import annotations

import json
import math
import mmap

import pytest

from esper.bench import soak
from esper.bench._drift import descriptors, drift, resident_mb, slope
from esper.bench._soak_host import SoakHost
from esper.errors import ConfigError
from esper.messages import ErrorRecoveryEvent, SignalBatch


def test_a_short_run_gives_flat_finite_figures() -> None:
    figures = soak.run(quick=True, cycles=120, layers=4, ask_every=10, decider="wait")
    assert set(soak.TARGETS) <= set(figures)
    assert json.loads(json.dumps(figures)) == figures
    assert all(map(math.isfinite, figures.values()))
    assert figures["cycles"] == 120
    assert (
        figures["lost"]
        == figures["task_drift"]
        == figures["thread_drift"]
        == figures["descriptor_drift"]
        == 0
    )
    assert 0 < figures["cycle_p50_ms"] <= figures["cycle_p99_ms"]


def test_options_out_of_range_are_refused() -> None:
    for options in ({"seconds": 0.0}, {"cycles": -1}, {"layers": 0}, {"ask_every": 0}, {"seconds": math.nan}):
        with pytest.raises(ConfigError, match="expected positive seconds"):
            soak.run(**options)  # type: ignore[arg-type]


def test_drift_and_slope_of_samples() -> None:
    assert drift([1.0, 1.0, 5.0, 3.0, 3.0, 3.0, 2.0, 2.0]) == 1.0
    assert slope([0.0, 10.0, 20.0, 30.0], [1.0, 2.0, 99.0, 4.0]) == pytest.approx(0.1, rel=0.6)
    assert slope([0.0, 10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.1)


def test_what_the_process_holds_is_seen() -> None:
    before = descriptors()
    with open(__file__):
        assert descriptors() == before + 1
    held_mb = resident_mb()
    with mmap.mmap(-1, 30_000_000) as held:  # pages of its own: a heap may have as much to spare
        held.write(b"x" * len(held))
        assert resident_mb() - held_mb > 25.0


def test_the_run_of_a_soak_brings_new_seeds_new_runs_and_errors() -> None:
    host = SoakHost(2, "soak")
    messages = [message for _ in range(1500) for message in host.messages()]
    batches = [message for message in messages if isinstance(message, SignalBatch)]
    assert len(batches) == 1500
    assert {batch.run_id for batch in batches} == {"soak-0", "soak-1"}
    assert len({seed_id for batch in batches for seed_id in batch.table.seed_ids}) == 1 + host.num_seeds
    assert sum(isinstance(message, ErrorRecoveryEvent) for message in messages) == 1
    assert host.facts().run_id == "soak-1"
