from __future__ import annotations

import pytest

from esper.errors import ConfigError, MessageError
from esper.report.folder import FIGURE, JOURNAL, SUMMARY, report, run_curves
from esper.report.journal import read_journal
from esper.report.summary import read_summary
from esper.report.table import render_text


def test_a_run_is_drawn_again(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    made = report(run)
    assert made.figure == run / FIGURE
    assert made.figure.stat().st_size > 10_000
    assert made.summary == read_summary(run / SUMMARY)
    assert "digits_mlp, seed 0" in render_text(made.table)


def test_the_curves_of_every_arm_are_found(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    growth, host = run_curves(run, read_summary(run / SUMMARY), read_journal(run / JOURNAL))
    assert growth.parameters == [(0, 100), (40, 150), (90, 200), (130, 150)]
    assert host.parameters == [(0, 100)]
    assert growth.loss.last < host.loss.last
    assert len(host.val_acc) == len(host.val_loss) == 10


def test_a_killed_run_is_drawn_from_what_it_left(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (run / SUMMARY).unlink()
    made = report(run, tmp_path / "elsewhere.svg")
    assert made.table is None
    assert "not finished" in made.figure.read_text()


def test_what_is_no_run_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a run folder.*it is empty"):
        report(tmp_path)


def test_damage_is_named(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (run / JOURNAL).write_text("nonsense\n")
    with pytest.raises(MessageError, match=r"growth\.jsonl, line 1"):
        report(run)
