"""States as they are finished: one file each, so that a generator that is killed goes on where it was."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import msgspec

from esper.atomic import replacing
from esper.errors import DataFormatError
from esper.tamiyo.oracle.records import StateRecord, check_record
from esper.tamiyo.oracle.table import TABLE_VERSION

__all__ = ["finished", "read_shards", "write_shard"]

_SUFFIX = ".state"
_MOST_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


class _Shard(msgspec.Struct, frozen=True):
    version: int
    record: StateRecord


def write_shard(folder: Path, record: StateRecord) -> Path:
    """Check one state and write it, complete or not at all.

    Raises:
        DataFormatError: The record does not fit together, or its id cannot be a file's name.
    """
    check_record(record)
    if not _NAME.fullmatch(record.state_id):
        raise DataFormatError(
            f"expected a state id of letters, digits, '_' and '-' for a file name, got {record.state_id!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (record.state_id + _SUFFIX)
    with replacing(path) as temporary:
        temporary.write_bytes(zlib.compress(msgspec.msgpack.encode(_Shard(TABLE_VERSION, record))))
    return path


def finished(folder: Path) -> set[str]:
    """Ids of the states that need not be tried again."""
    # A kill may leave a hidden file that was not renamed; glob leaves those out only by name.
    return {path.stem for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith(".")}


def read_shards(folder: Path) -> list[StateRecord]:
    """Read every finished state, by id.

    Raises:
        DataFormatError: A file is damaged or of another version.
    """
    return [_read(folder / (name + _SUFFIX)) for name in sorted(finished(folder))]


def _read(path: Path) -> StateRecord:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(path.read_bytes(), _MOST_BYTES)
        shard = msgspec.msgpack.decode(content, type=_Shard)
    except (zlib.error, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DataFormatError(f"{path} is no whole state of an oracle table: {error}; delete it") from error
    if shard.version != TABLE_VERSION:
        raise DataFormatError(f"{path}: expected version {TABLE_VERSION}, got {shard.version}; delete it")
    check_record(shard.record)
    return shard.record
