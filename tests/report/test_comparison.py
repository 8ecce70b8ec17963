from __future__ import annotations

import math

import numpy as np
import pytest

from esper.errors import ConfigError
from esper.report.comparison import compare, compare_arms
from esper.report.folder import SUMMARY
from esper.report.statistics import bootstrap_mean, paired_difference
from esper.report.summary import read_summary
from esper.report.table import render_text


def _rows(folders):
    return compare_arms(read_summary(folder / SUMMARY) for folder in folders)


def test_arms_are_paired_by_seed_and_sorted(tmp_path, make_run):
    folders = [
        make_run(tmp_path / f"{policy}{seed}", seed=seed, policy=policy, gain=gain)
        for policy, gain in (("random", 0.02), ("expressivity", 0.05))
        for seed in range(3)
    ]
    rows = _rows(folders)
    assert [row.arm for row in rows] == ["growth (expressivity)", "growth (random)", "host"]
    best, _, host = rows
    assert best.seeds == (0, 1, 2)
    assert best.accuracy_gain.mean == pytest.approx(0.05)
    # hosts differ from seed to seed, gains do not: pairing makes the interval tight
    assert np.ptp(best.accuracy_gain.interval) < 1e-9 < np.ptp(best.accuracy.interval)
    assert host.accuracy.num == 3
    assert (host.baseline, host.accuracy_gain) == (None, None)

    text = render_text(compare(folders))
    assert "+5.0 pt" in text
    assert "paired by seed" in text


def test_one_run_has_no_intervals(tmp_path, make_run):
    text = render_text(compare([make_run(tmp_path / "a")]))
    assert "[" not in text
    assert "+5.0 pt" in text


def test_a_sweep_folder_stands_for_its_runs_and_doubles_count_once(tmp_path, make_run):
    for seed in range(2):
        make_run(tmp_path / "sweep" / str(seed), seed=seed)
    rows = _rows([tmp_path / "sweep/0", tmp_path / "sweep/1"])
    text = render_text(compare([tmp_path / "sweep", tmp_path / "sweep" / "0"]))
    assert [row.seeds for row in rows] == [(0, 1), (0, 1)]
    assert " 2 " in text


def test_experiments_and_configs_are_kept_apart(tmp_path, make_run):
    folders = [
        make_run(tmp_path / "a", config_hash="1111"),
        make_run(tmp_path / "b", config_hash="2222"),
        make_run(tmp_path / "c", experiment="fashion_cnn"),
    ]
    rows = _rows(folders)
    assert [(row.experiment, row.arm) for row in rows] == [
        ("digits_mlp", "growth (expressivity)\n#1111"), ("digits_mlp", "growth (expressivity)\n#2222"),
        ("digits_mlp", "host"), ("fashion_cnn", "growth (expressivity)"), ("fashion_cnn", "host"),
    ]  # fmt: skip
    assert "fashion_cnn" in render_text(compare(folders))


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other"])
def test_what_is_no_run_folder_is_named(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        path.mkdir()
        if kind == "other":
            (path / "notes.txt").write_text("")
    found = {
        "missing": "nothing is there",
        "file": "it is a file",
        "empty": "it is empty",
        "other": "it holds notes.txt",
    }
    with pytest.raises(ConfigError, match=f"expected a run folder with summary.json.*{found[kind]}"):
        compare([path])


def test_the_bootstrap_covers_the_mean():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_mean(list(generator.normal(1.0, 1.0, 30)), resamples=500).interval
        hits += low <= 1.0 <= high
    assert 0.88 < hits / 200 <= 1.0


def test_estimates_of_few_and_of_diverged_values():
    assert bootstrap_mean([2.0]).interval is None
    assert bootstrap_mean([1.0, 3.0]).interval == (1.0, 3.0)
    assert bootstrap_mean([1.0, math.inf]).mean == math.inf
    assert math.isnan(bootstrap_mean([math.inf, -math.inf]).mean)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean([])


def test_a_diverged_arm_comes_last(tmp_path, make_run):
    rows = _rows([make_run(tmp_path / "a", gain=math.nan), make_run(tmp_path / "b", seed=1, policy="random")])
    assert [row.arm for row in rows] == ["growth (random)", "host", "growth (expressivity)"]
