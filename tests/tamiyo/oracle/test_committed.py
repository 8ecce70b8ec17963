"""The table that comes with the repository is whole, and later versions of the code still read it."""

from __future__ import annotations

from pathlib import Path

from esper.tamiyo.environment.families import KNOWN, SEALED
from esper.tamiyo.oracle.analysis import PRICES
from esper.tamiyo.oracle.records import utilities
from esper.tamiyo.oracle.rules import RULES
from esper.tamiyo.oracle.splits import of_split
from esper.tamiyo.oracle.table import read_table

TABLE = Path(__file__).parents[3] / "experiments" / "oracle" / "table"


def test_the_committed_table_reads_and_covers_all_families() -> None:
    records = read_table(TABLE)
    assert len(of_split(records, "train")) >= 150
    assert len(of_split(records, "validation")) >= 30
    for split in ("train", "validation", "test"):
        assert {record.family for record in of_split(records, split)} == set(KNOWN)
    assert {record.family for record in of_split(records, "sealed")} == set(SEALED)
    for record in records:
        assert record.num_repeats >= 2
        assert utilities(record, PRICES[-1])[0].tolist() == [0.0] * record.num_repeats
        for variants in RULES.values():
            assert not record.point.candidates[variants[0].choose(record.point)].unavailable
