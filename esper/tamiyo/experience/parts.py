"""What many decision points have in common, kept once: the topology, and the signals of each sampled step.

A run's decision points show the same window of steps over and over, one step further each time. Kept whole, a
host of 64 layers would take half a megabyte a decision; so a point is stored as the digests of its parts.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec

from esper.errors import ConfigError, DataFormatError
from esper.kasmina.topology import ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.experience.packing import compress, pack, unpack
from esper.tamiyo.graph.facts import Candidate, DecisionPoint, RunFacts

__all__ = ["SharedParts"]

_DIGEST_BYTES = 16
_MOST_KEPT_BYTES = 4_000_000  # packed; as objects they take some six times as much
_AT_ONCE = 500

_PartT = TypeVar("_PartT")


class _PointOfParts(msgspec.Struct, frozen=True):
    run: RunFacts
    topology: bytes
    signals: tuple[bytes, ...]
    candidates: tuple[Candidate, ...]
    timestamp: float


class SharedParts:
    """Writes and reads decision points; keeps what it has read lately, as the next point is made of it too.

    Args:
        path: Of the store, for errors.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: dict[bytes, Any] = {}
        self._read_bytes = 0

    def write(self, db: sqlite3.Connection, point: DecisionPoint) -> bytes:
        """Write the parts that are not there yet, within the transaction under way; returns the rest, packed.

        Raises:
            ConfigError: A field holds what its type does not allow.
        """
        steps = itertools.groupby(point.signals, key=lambda signal: signal.step)
        parts = [_encode(point.topology), *(_encode(list(group)) for _, group in steps)]
        digests = [blake2b(part, digest_size=_DIGEST_BYTES).digest() for part in parts]
        wanted = dict(zip(digests, parts, strict=True))
        for some in _batches(list(wanted)):
            marks = ", ".join("?" * len(some))
            for (known,) in db.execute(f"SELECT digest FROM parts WHERE digest IN ({marks})", some):
                del wanted[known]
        db.executemany(
            "INSERT INTO parts VALUES (?, ?)", [(digest, compress(part)) for digest, part in wanted.items()]
        )
        topology, *signals = digests
        return pack(_PointOfParts(point.run, topology, tuple(signals), point.candidates, point.timestamp))

    def read(self, db: sqlite3.Connection, data: object, where: str) -> DecisionPoint:
        """The decision point that :meth:`write` was given.

        Args:
            db: The store.
            data: What it returned.
            where: File and row, for the error.

        Raises:
            DataFormatError: The bytes are something else or damaged, or a part is missing.
        """
        rest = unpack(data, _PointOfParts, where)
        signals = [self._part(db, digest, list[HealthSignal], where) for digest in rest.signals]
        return DecisionPoint(
            run=rest.run,
            topology=self._part(db, rest.topology, ModelTopology, where),
            signals=tuple(itertools.chain.from_iterable(signals)),
            candidates=rest.candidates,
            timestamp=rest.timestamp,
        )

    def _part(self, db: sqlite3.Connection, digest: bytes, kind: type[_PartT], where: str) -> _PartT:
        if digest not in self._read:
            row = db.execute("SELECT facts FROM parts WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                raise DataFormatError(f"{where}: the store is damaged: its part {digest.hex()} is missing")
            unpacked = unpack(row[0], kind, where)
            if self._read_bytes + len(row[0]) > _MOST_KEPT_BYTES:
                self._read.clear()
                self._read_bytes = 0
            self._read[digest] = unpacked
            self._read_bytes += len(row[0])
            return unpacked
        part: _PartT = self._read[digest]
        return part


def _encode(part: object) -> bytes:
    try:
        return msgspec.msgpack.encode(part)
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise ConfigError(f"a decision point cannot be stored: {error}") from error


def _batches(digests: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [digests[i : i + _AT_ONCE] for i in range(0, len(digests), _AT_ONCE)]
