"""The oracle benchmark reads a table and reports what it says; what the committed one says is in experiments/oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracle_states import make_record

from esper.bench import oracle
from esper.errors import DataFormatError, DataNotFoundError
from esper.tamiyo.oracle.table import write_table

BEST_AROUND = [[1.0, 1.0], [0.9, 0.9], [0.8, 0.8], [1.0, 1.0], [0.8, 0.8], [0.5, 0.5], [1.0, 1.0]]


def test_figures_of_a_table_made_by_hand(tmp_path: Path) -> None:
    splits = ("train", "validation", "test", "sealed")
    write_table(
        tmp_path,
        [make_record(10 * i + n, BEST_AROUND, split=s) for i, s in enumerate(splits) for n in range(3)],
    )
    out = tmp_path / "result.json"
    figures = oracle.run(table=str(tmp_path), prices=(0.0, 0.3), out=str(out))
    assert (figures["states"], figures["runs"], figures["test_hosts"]) == (12, 12 * 14, 3)
    assert figures["reliability_0"] == pytest.approx(1.0)
    for split in splits:
        assert figures[f"{split}_0_oracle"] == pytest.approx(0.5)
        assert figures[f"{split}_0_headroom"] == pytest.approx(0.0)  # the rule `shortcut` finds it
        assert figures[f"{split}_0_headroom_no_shortcut"] == pytest.approx(0.0)  # so does `narrowest`, large
        assert figures[f"{split}_0_wait_best"] == 0.0
        assert figures[f"{split}_0_accuracy"] == 1.0
        assert figures[f"{split}_0.3_oracle"] < 0.5
    record = json.loads(out.read_text())
    rows = [r for r in record["runs"] if (r["split"], r["price"], r["shortcut"]) == ("test", 0.0, True)]
    chosen = {r["chooser"]: r["utility"] for r in rows if not r["family"]}
    assert chosen["wait"] == 0.0
    assert chosen["narrowest"] == pytest.approx(0.2)
    assert {r["chooser"] for r in rows if r["best"]} <= {"shortcut", "expressivity"}
    assert set(oracle.run(table=str(tmp_path), quick=True)) < set(figures)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="expected the oracle table's file"):
        oracle.run(table=str(tmp_path))
    write_table(tmp_path, [make_record()])
    with pytest.raises(DataFormatError, match="expected validation states"):
        oracle.run(table=str(tmp_path))
