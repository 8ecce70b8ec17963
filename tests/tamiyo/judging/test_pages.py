"""Tables and the forest plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged_trials import trial

from esper.report.statistics import Estimate
from esper.tamiyo.judging.figures import Board
from esper.tamiyo.judging.forest import ForestRow, forest_figure
from esper.tamiyo.judging.markdown import arms_table, differences_table, families_table


def test_tables_say_what_the_board_says() -> None:
    trials = [trial("none", host) for host in range(2)]
    trials += [trial("grown", 0, test_loss=0.75), trial("grown", 1, test_loss=0.5, asked=2, waited=1)]
    board = Board(trials, "fresh", "flops", ("none", "grown"))
    rows = arms_table(board).splitlines()
    assert rows[2].startswith("| grown | +0.375 [+0.250, +0.500] | +0.375 | 0.625 |")
    assert "| 50% |" in rows[2]
    assert rows[3].startswith("| none | +0.000")
    assert "| 100% |" in differences_table([("none", board.difference("grown", "none"))])
    assert "| digits_mlp | +0.375 (+0.375) |" in families_table(board, ["grown"])


def test_the_figure_holds_every_row_and_needs_one(tmp_path: Path) -> None:
    rows = [
        ForestRow("best rule", Estimate(0.1, 9, (0.02, 0.2)), 0.05, 9, head=True),
        ForestRow("one host", Estimate(5.0, 1, None), 5.0, 1),
    ]
    path = forest_figure({"fresh": rows, "sealed": []}, tmp_path / "f.svg", title="t", axis="nats")
    text = path.read_text()
    assert text.startswith("<?xml")
    with pytest.raises(ValueError, match="at least one row"):
        forest_figure({"fresh": []}, tmp_path / "f.png", title="t", axis="nats")
