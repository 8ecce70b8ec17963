"""The oracle table on disk: what is written comes back, and what was changed is refused."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from oracle_states import make_record
from pyarrow import parquet

from esper.errors import DataFormatError, DataNotFoundError
from esper.tamiyo.oracle.records import StateRecord
from esper.tamiyo.oracle.shards import finished, read_shards, write_shard
from esper.tamiyo.oracle.table import OUTCOMES, STATES, fingerprint, read_table, write_table


def records() -> list[StateRecord]:
    failed = make_record(7)
    last = msgspec.structs.replace(
        failed.outcomes[-1], held_out_loss=math.inf, test_loss=math.inf, test_accuracy=None, error="diverged"
    )
    failed = msgspec.structs.replace(failed, outcomes=(*failed.outcomes[:-1], last))
    return [make_record(0), make_record(1, split="validation"), make_record(2, split="sealed"), failed]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_table(tmp_path, records())
    assert read_table(tmp_path) == records()
    flat = parquet.read_table(tmp_path / OUTCOMES)
    assert flat.num_rows == 4 * 7 * 2
    assert set(flat.column("action").to_pylist()) == {"wait", "grow", "recycle"}


def change(folder: Path, file: str, column: str, value: object, *, forge: bool) -> None:
    """Change one cell of the first row, and with ``forge`` the fingerprints too."""
    tables = {name: parquet.read_table(folder / name) for name in (STATES, OUTCOMES)}
    rows = {name: table.to_pylist() for name, table in tables.items()}
    rows[file][0][column] = value
    for name, table in tables.items():
        metadata = dict(table.schema.metadata)
        if forge:
            metadata[b"esper.fingerprint"] = fingerprint(rows[STATES], rows[OUTCOMES]).encode()
        changed = pa.Table.from_pylist(rows[name], schema=table.schema.with_metadata(metadata))
        parquet.write_table(changed, folder / name)


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [(OUTCOMES, "held_out_loss", 0.123), (OUTCOMES, "parameters", 7), (STATES, "point", b"\x80")],
)
def test_a_changed_cell_is_refused(tmp_path: Path, file: str, column: str, value: object) -> None:
    write_table(tmp_path, records())
    change(tmp_path, file, column, value, forge=False)
    with pytest.raises(DataFormatError, match="was changed after it was written"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("file", "column", "value", "said"),
    [
        (OUTCOMES, "family", "other", "differ about candidate 0"),
        (OUTCOMES, "candidate_json", '{"action": "grow"}', "differ about candidate 0"),
        (OUTCOMES, "candidate_json", "{}", "missing required field"),
        (OUTCOMES, "state_id", "nobody", "expected one outcome of each of 7 available candidates"),
        (OUTCOMES, "repeat", -3, "repeat"),
        (OUTCOMES, "held_out_loss", math.nan, "has the losses"),
        (STATES, "state_id", "validation-1", "twice in the table"),
        (STATES, "split", "test", "not those of its spec"),
        (STATES, "moment", "never", "Invalid enum value"),
        (STATES, "spec_json", "{}", "missing required field"),
        (STATES, "point", b"\x80", "missing required field"),
    ],
)
def test_what_does_not_fit_together_is_refused_whatever_its_fingerprint(
    tmp_path: Path, file: str, column: str, value: object, said: str
) -> None:
    write_table(tmp_path, records())
    change(tmp_path, file, column, value, forge=True)
    with pytest.raises(DataFormatError, match=said):
        read_table(tmp_path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"generate\.py makes it"):
        read_table(tmp_path)
    write_table(tmp_path, records())
    whole = (tmp_path / STATES).read_bytes()
    (tmp_path / STATES).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataFormatError, match="no readable Parquet file"):
        read_table(tmp_path)
    write_table(tmp_path, records()[:2])
    (tmp_path / STATES).write_bytes(whole)
    with pytest.raises(DataFormatError, match="come from two tables"):
        read_table(tmp_path)
    table = parquet.read_table(tmp_path / STATES)
    other = {**table.schema.metadata, b"esper.oracle_version": b"99"}
    parquet.write_table(table.replace_schema_metadata(other), tmp_path / STATES)
    with pytest.raises(DataFormatError, match=r"expected esper\.oracle_version 1, got 99"):
        read_table(tmp_path)
    parquet.write_table(table.drop_columns(["moment"]), tmp_path / STATES)
    with pytest.raises(DataFormatError, match="expected the columns"):
        read_table(tmp_path)


def test_states_are_checked_before_they_are_written(tmp_path: Path) -> None:
    record = make_record()
    for outcomes, said in (
        (record.outcomes[2:], "expected one outcome of each"),
        (record.outcomes[:-1], "expected one outcome of each"),
        ((), "expected one outcome of each"),
        (
            (msgspec.structs.replace(record.outcomes[0], held_out_loss=math.inf), *record.outcomes[1:]),
            "nothing to compare with",
        ),
        (
            (msgspec.structs.replace(record.outcomes[0], test_loss=math.nan), *record.outcomes[1:]),
            "has the losses",
        ),
    ):
        with pytest.raises(DataFormatError, match=said):
            write_table(tmp_path, [msgspec.structs.replace(record, outcomes=outcomes)])
    assert list(tmp_path.iterdir()) == []


def test_shards_keep_finished_states(tmp_path: Path) -> None:
    assert finished(tmp_path) == set()
    for record in records():
        write_shard(tmp_path, record)
    (tmp_path / ".half.tmp.state").write_bytes(b"killed")
    assert finished(tmp_path) == {record.state_id for record in records()}
    assert {r.state_id: r for r in read_shards(tmp_path)} == {r.state_id: r for r in records()}
    path = tmp_path / "train-0.state"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataFormatError, match="no whole state"):
        read_shards(tmp_path)
    with pytest.raises(DataFormatError, match="for a file name"):
        write_shard(tmp_path, make_record(state_id="../x"))
