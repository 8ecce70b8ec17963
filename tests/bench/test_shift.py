"""The shift benchmark's streams are paired and its rule acts; what it finds out is in experiments/shift."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper.bench import shift
from esper.bench._shift_stream import Stream, train_stream
from esper.errors import DataNotFoundError

SHORT = Stream("continue", "swap", 0, 1e-2, num_tasks=3, steps=40, batch_size=8, width=8)


def test_missing_data_are_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    with pytest.raises(DataNotFoundError, match="export ESPER_DATA_DIR"):
        shift.run(quick=True)


def test_a_stream_repeats_exactly_and_watching_alone_changes_nothing(data_dir: Path) -> None:
    torch.set_num_threads(1)
    plain = train_stream(SHORT)
    assert plain == train_stream(SHORT)
    watched = train_stream(replace(SHORT, arm="recycle"))  # too short for a sampled step
    assert watched["recycled"] == 0
    assert watched["accuracy"] == plain["accuracy"]


def test_the_rule_recycles_a_net_that_has_fallen_asleep(data_dir: Path) -> None:
    sleepy = Stream("recycle", "swap", 0, 0.03, num_tasks=5, steps=100, batch_size=8)
    assert train_stream(sleepy)["recycled"] > 0


def test_a_small_run_reports_every_figure_with_a_target(data_dir: Path) -> None:
    figures = shift.run(seeds=2, num_tasks=2, steps=10, num_workers=0)
    assert set(shift.TARGETS) <= set(figures)
    difference = figures["swap_recycle"] - figures["swap_reset"]
    assert figures["swap_recycle_over_reset"] == pytest.approx(difference)
