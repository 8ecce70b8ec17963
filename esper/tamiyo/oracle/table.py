"""The table on disk: two Parquet files, one row a state and one row an outcome.

``states.parquet`` holds each decision point as msgpack, so that a later version of the graph features can be
made from it; ``outcomes.parquet`` is flat, for whatever reads Parquet. Both carry the version of the schema and
one fingerprint of all rows, so files that were edited, or that do not belong together, are refused. It is taken
of the rows as stored: structs that gain a field with a default still read an older table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from esper.atomic import replacing
from esper.errors import DataFormatError, DataNotFoundError, MissingExtraError
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.graph.facts import FACTS_VERSION, Candidate, DecisionPoint
from esper.tamiyo.oracle.records import Moment, Outcome, StateRecord, check_record
from esper.tamiyo.oracle.splits import check_splits

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["OUTCOMES", "STATES", "TABLE_VERSION", "fingerprint", "read_table", "write_table"]

TABLE_VERSION = 1
"""Counts changes of the columns and of what they mean."""

STATES = "states.parquet"
OUTCOMES = "outcomes.parquet"
_MOST_BYTES = 256 << 20
"""A file larger than this is not one of ours; read before anything is allocated for it."""


def write_table(folder: Path, records: Sequence[StateRecord]) -> None:
    """Check the records and write both files; each replaces an older one in one move.

    Raises:
        DataFormatError: A record does not fit together, or a host is in two splits.
    """
    _check(records)
    parquet, schemas = _parquet(), _schemas()
    import pyarrow as pa

    rows = {
        STATES: [_state_row(record) for record in records],
        OUTCOMES: [row for record in records for row in _outcome_rows(record)],
    }
    metadata = {
        "esper.oracle_version": str(TABLE_VERSION),
        "esper.facts_version": str(FACTS_VERSION),
        "esper.fingerprint": fingerprint(rows[STATES], rows[OUTCOMES]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas.items():
        table = pa.Table.from_pylist(rows[name], schema=schema.with_metadata(metadata))
        with replacing(folder / name) as temporary:
            parquet.write_table(table, temporary, compression="zstd", compression_level=15)


def read_table(folder: Path) -> list[StateRecord]:
    """Read a table and check everything that it says of itself.

    Raises:
        DataNotFoundError: A file is not there.
        DataFormatError: It is of another version, does not hold what the schema promises, or was changed.
        MissingExtraError: pyarrow is not installed.
    """
    states, outcomes = _load(folder / STATES), _load(folder / OUTCOMES)
    marks = [table.schema.metadata[b"esper.fingerprint"] for table in (states, outcomes)]
    if marks[0] != marks[1]:
        raise DataFormatError(f"{STATES} and {OUTCOMES} in {folder} come from two tables; generate them anew")
    state_rows, outcome_rows = states.to_pylist(), outcomes.to_pylist()
    if (found := fingerprint(state_rows, outcome_rows)).encode() != marks[0]:
        raise DataFormatError(
            f"the table in {folder} was changed after it was written: its fingerprint is {marks[0].decode()[:12]}..., "
            f"that of its rows {found[:12]}...; generate it anew"
        )
    by_state: dict[str, list[dict[str, Any]]] = {}
    for row in outcome_rows:
        by_state.setdefault(row["state_id"], []).append(row)
    records = [_record(row, by_state.get(row["state_id"], []), folder) for row in state_rows]
    _check(records)
    if unknown := sorted(by_state.keys() - {record.state_id for record in records}):
        raise DataFormatError(
            f"{folder / OUTCOMES} has outcomes of states that {STATES} lacks: {unknown[:3]}"
        )
    for record in records:
        _check_flat(record, by_state[record.state_id], folder)
    return records


def fingerprint(states: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of all rows of both files, in their order."""
    digest, encoder = hashlib.sha256(), msgspec.msgpack.Encoder(order="deterministic")
    for row in (*states, *outcomes):
        digest.update(encoder.encode(row))
    return digest.hexdigest()


def _check(records: Sequence[StateRecord]) -> None:
    if not records:
        raise DataFormatError("expected at least one state in an oracle table, got none")
    for record in records:
        check_record(record)
    check_splits(records)


def _load(path: Path) -> pa.Table:
    parquet = _parquet()
    import pyarrow as pa

    if not path.is_file():
        raise DataNotFoundError(
            f"expected the oracle table's file {path}, but there is none; experiments/oracle/generate.py makes it"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise DataFormatError(f"{path} has {path.stat().st_size} bytes, more than {_MOST_BYTES}")
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataFormatError(f"{path} is no readable Parquet file: {error}") from error
    metadata = table.schema.metadata or {}
    expected = {
        b"esper.oracle_version": str(TABLE_VERSION).encode(),
        b"esper.facts_version": str(FACTS_VERSION).encode(),
    }
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise DataFormatError(
                f"{path}: expected {key.decode()} {value.decode()}, got {metadata.get(key, b'none').decode()}; "
                "generate the table anew"
            )
    if b"esper.fingerprint" not in metadata:
        raise DataFormatError(f"{path} carries no fingerprint; generate the table anew")
    wanted = _schemas()[path.name]
    if not table.schema.equals(wanted, check_metadata=False):
        raise DataFormatError(f"{path}: expected the columns\n{wanted}\ngot\n{table.schema}")
    if any(table.column(field.name).null_count for field in wanted if not field.nullable):
        raise DataFormatError(f"{path} has empty cells in columns that must not have any")
    return table


def _state_row(record: StateRecord) -> dict[str, Any]:
    return {
        "state_id": record.state_id,
        "split": record.split,
        "family": record.family,
        "number": record.spec.number,
        "moment": record.moment,
        "spec_json": msgspec.json.encode(record.spec, order="deterministic").decode(),
        "point": msgspec.msgpack.encode(record.point),
    }


def _outcome_rows(record: StateRecord) -> list[dict[str, Any]]:
    rows = []
    for outcome in record.outcomes:
        candidate = record.point.candidates[outcome.candidate]
        rows.append(
            {
                "state_id": record.state_id,
                "split": record.split,
                "family": record.family,
                "step": record.point.run.step,
                "action": candidate.action,
                "candidate_json": _candidate_json(candidate),
                **msgspec.structs.asdict(outcome),
            }
        )
    return rows


def _record(row: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path) -> StateRecord:
    try:
        record = StateRecord(
            state_id=row["state_id"],
            moment=msgspec.convert(row["moment"], Moment),
            spec=msgspec.json.decode(row["spec_json"], type=HostSpec),
            point=msgspec.msgpack.decode(row["point"], type=DecisionPoint),
            outcomes=tuple(_outcome(row, folder) for row in rows),
        )
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DataFormatError(f"state {row['state_id']!r} in {folder / STATES}: {error}") from error
    if (row["split"], row["family"], row["number"]) != (record.split, record.family, record.spec.number):
        raise DataFormatError(
            f"state {row['state_id']!r} in {folder / STATES}: split, family and number are not those of its spec"
        )
    return record


def _outcome(row: dict[str, Any], folder: Path) -> Outcome:
    try:
        return msgspec.convert({key: row[key] for key in Outcome.__struct_fields__}, Outcome)
    except msgspec.ValidationError as error:
        raise DataFormatError(f"an outcome of {row['state_id']!r} in {folder / OUTCOMES}: {error}") from error


def _check_flat(record: StateRecord, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Check that columns which repeat what the state says do say the same."""
    for row in rows:
        candidate = record.point.candidates[row["candidate"]]
        told = (row["split"], row["family"], row["step"], row["action"])
        try:
            same = msgspec.json.decode(row["candidate_json"], type=Candidate) == candidate
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise DataFormatError(
                f"a candidate of {record.state_id!r} in {folder / OUTCOMES}: {error}"
            ) from error
        if not same or told != (record.split, record.family, record.point.run.step, candidate.action):
            raise DataFormatError(
                f"{STATES} and {OUTCOMES} in {folder} differ about candidate {row['candidate']} of {record.state_id!r}"
            )


def _candidate_json(candidate: Candidate) -> str:
    return msgspec.json.encode(candidate, order="deterministic").decode()


def _schemas() -> dict[str, pa.Schema]:
    import pyarrow as pa

    def required(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    text, real, count = pa.string(), pa.float64(), pa.int64()
    states = [
        *(required(name, text) for name in ("state_id", "split", "family")),
        required("number", count),
        required("moment", text),
        required("spec_json", text),
        required("point", pa.binary()),
    ]
    outcomes = [
        *(required(name, text) for name in ("state_id", "split", "family")),
        required("step", count),
        required("action", text),
        required("candidate_json", text),
        required("candidate", pa.int32()),
        required("repeat", pa.int32()),
        required("held_out_loss", real),
        required("test_loss", real),
        pa.field("test_accuracy", real),
        required("parameters", count),
        *(required(name, real) for name in ("training_flops", "forward_flops", "wall_time_s")),
        required("culled", pa.int32()),
        required("rolled_back", pa.int32()),
        required("refused", text),
        required("error", text),
    ]
    return {STATES: pa.schema(states), OUTCOMES: pa.schema(outcomes)}


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            'reading and writing the oracle table needs pyarrow, which is not installed; run pip install "esper[learn]"'
        ) from error
    return parquet
