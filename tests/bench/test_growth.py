"""The growth benchmark trains, pairs and reports; what it finds out is in experiments/growth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.bench import growth
from esper.bench._digits_arms import DigitsRun, train_digits
from esper.errors import ConfigError
from esper.hosts import MLPConfig


def test_a_small_run_reports_every_arm_and_writes_its_record(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    figures = growth.run(num_hosts=2, epochs=2, policies=("shortcut",), num_workers=0, out=str(out))
    assert json.loads(json.dumps(figures)) == figures
    assert figures["num_failed"] == 0
    for arm in ("off", "lr2", "shortcut", "shortcut_isolated"):
        assert figures[f"{arm}_test_loss"] > 0
        low, high = figures[f"{arm}_vs_uniform_loss_low"], figures[f"{arm}_vs_uniform_loss_high"]
        assert low <= figures[f"{arm}_vs_uniform_loss"] <= high
    gain = figures["off_test_loss"] - figures["shortcut_test_loss"]
    assert figures["shortcut_gain_loss"] == pytest.approx(gain)
    record = json.loads(out.read_text())
    assert record["machine"]["cores"] >= 1
    assert {"torch", "lightning"} <= set(record["versions"])
    grown = [row for row in record["runs"] if row["arm"] == "shortcut"]
    assert {row["host"] for row in grown} == {0, 1}
    assert all(row["germinated"] == 1 for row in grown)
    for row in grown:  # the uniform net of this host has the arm's final size
        sizes = [
            MLPConfig(hidden=tuple(peer["hidden"])).num_parameters
            for peer in record["runs"]
            if peer["arm"] == "uniform" and peer["host"] == row["host"]
        ]
        assert min(abs(size - row["parameters"]) for size in sizes) < 0.1 * row["parameters"]


def test_arms_of_one_host_start_from_the_same_weights_and_the_seed_decides_everything() -> None:
    run = DigitsRun("off", 3, growth.random_widths(3), epochs=1)
    first, second = train_digits(run), train_digits(run)
    first.pop("wall_time_s")
    second.pop("wall_time_s")
    assert first == second


def test_a_run_that_fails_is_reported_and_counted() -> None:
    row = train_digits(DigitsRun("broken", 0, (4,), policy="no-such-policy", epochs=1))
    assert "no policy named 'no-such-policy'" in row["error"]


def test_widths_are_random_and_repeatable() -> None:
    widths = [growth.random_widths(host) for host in range(20)]
    assert widths == [growth.random_widths(host) for host in range(20)]
    assert len(set(widths)) == 20
    assert all(3 <= width <= 32 for hidden in widths for width in hidden)


def test_wrong_options_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match="at least two hosts"):
        growth.run(num_hosts=1)
    with pytest.raises(ConfigError, match="no policy named 'nope'"):
        growth.run(num_hosts=2, policies=("nope",))
