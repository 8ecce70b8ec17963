"""Health signals as columns: the form in which probes make them and the bus carries them.

A table of ``n`` signals is one block of bytes, column after column, little-endian, in the order of the
fields of :class:`esper.messages.HealthSignal` within each type::

    12 columns of n float64 | 6 columns of n uint64 | 1 column of n bytes, 0 or 1

which is 145 bytes a signal. float64 because the figures are computed in it and must arrive as they were;
uint64 because every bit pattern of it is a valid count. Layer and seed ids travel beside it, as MessagePack
of ``(layer_ids, seed_ids)``: they are the same from step to step, so a reader decodes them once.

Turning 64 signals of 21 fields into Python objects costs more than everything else that happens to them on
the bus. As columns they are made, packed and validated by a few vector operations; the objects are built
when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from struct import Struct
from struct import error as struct_error
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.errors import MessageError
from esper.messages import HealthSignal

__all__ = ["SignalTable"]

_FLOAT = np.dtype("<f8")
_COUNT = np.dtype("<u8")
_FLAG = np.dtype("?")
_INFINITY = float("inf")
_RANGES = {
    "activation_variance": (0.0, _INFINITY),
    "dead_neuron_ratio": (0.0, 1.0),
    "dormancy": (0.0, 1.0),
    "avg_correlation": (-1.0, 1.0),
    "effective_rank": (0.0, _INFINITY),
    "gradient_norm": (0.0, _INFINITY),
    "gradient_snr": (0.0, _INFINITY),
    "update_ratio": (0.0, _INFINITY),
    "expressivity": (0.0, _INFINITY),
    "health_score": (0.0, 1.0),
    "execution_latency": (0.0, _INFINITY),
    "timestamp": (-_INFINITY, _INFINITY),
}
"""Float column -> smallest and largest value; NaN lies in none."""
_COUNTS = ("chunk_id", "epoch", "step", "error_count", "active_seeds", "total_seeds")
_FLAGS = ("is_ready_for_transition",)
_PLACES: dict[str, tuple[int, int, str]] = {
    **{name: (0, row, "d") for row, name in enumerate(_RANGES)},
    **{name: (1, row, "Q") for row, name in enumerate(_COUNTS)},
    **{name: (2, row, "?") for row, name in enumerate(_FLAGS)},
}
"""Column, in the order of the wire -> which of :func:`_views`, its row there, its type's code in struct."""
_NAMES = HealthSignal.__struct_fields__[2:]  # without the two ids
_ORDER = [_PLACES[name][:2] for name in _NAMES]
_FLOAT_BYTES, _COUNT_BYTES = 8 * len(_RANGES), 8 * len(_COUNTS)
_SIGNAL_BYTES = _FLOAT_BYTES + _COUNT_BYTES + len(_FLAGS)
assert set(_NAMES) == set(_PLACES), "HealthSignal and the columns of its table differ"

_MAX_KEPT_IDS_BYTES = 64 * 1024
_IDS = msgspec.msgpack.Decoder(tuple[tuple[str, ...], tuple[str, ...]])


class SignalTable(Sequence[HealthSignal]):
    """Signals of one sampled step; as a sequence it gives :class:`HealthSignal` objects, built on first use.

    Make one with :meth:`of_step` (what probes do), :meth:`of` (from objects) or :meth:`read` (from
    bytes, with validation). It is not to be changed afterwards.

    Attributes:
        layer_ids: layer of each signal.
        seed_ids: seed of each signal; empty for a layer's own.
        columns: the block of bytes that the module describes.
    """

    def __init__(self, layer_ids: Sequence[str], seed_ids: Sequence[str], columns: bytes) -> None:
        assert len(columns) == _SIGNAL_BYTES * len(layer_ids), "a block of another number of signals"
        self.layer_ids = layer_ids
        self.seed_ids = seed_ids
        self.columns = columns

    @classmethod
    def of_step(
        cls,
        layer_ids: Sequence[str],
        seed_ids: Sequence[str],
        *,
        step: int,
        epoch: int,
        timestamp: float,
        statistics: NDArray[np.float64],
        expressivity: NDArray[Any] | Sequence[float],
        ready: Sequence[bool],
        health: NDArray[Any] | Sequence[float],
        latency_ms: NDArray[Any] | Sequence[float],
        error_count: NDArray[Any] | Sequence[int],
        active_seeds: NDArray[Any] | Sequence[int],
        total_seeds: NDArray[Any] | Sequence[int],
    ) -> SignalTable:
        """Make the table of a sampled step from what was measured on it, one entry a signal (``n``).

        Written out column by column because it stands between a training step and the bus: for 64 signals a
        fifth of what it takes from objects. Columns that are arrays already cost least.

        Args:
            layer_ids: layer of each signal. When these and the seed ids are the same tuples as last time,
                what travels of them is not written anew.
            seed_ids: seed of each, empty for a layer's own.
            step: step of all.
            epoch: epoch of all.
            timestamp: Unix seconds of all.
            statistics: ``[8, n]``, the fields ``activation_variance`` to ``update_ratio`` in their order.
            expressivity: as in :class:`HealthSignal`, like those that follow.
            ready: ``is_ready_for_transition``.
            health: ``health_score``.
            latency_ms: ``execution_latency``.
            error_count: whole numbers, of any numeric type.
            active_seeds: counts.
            total_seeds: counts.

        Raises:
            MessageError: columns of different lengths, or a value of another type. Ranges are not looked at
                here: whoever reads the table does.
        """
        num = len(layer_ids)
        lengths = [
            len(column)
            for column in (
                seed_ids, expressivity, ready, health, latency_ms, error_count, active_seeds, total_seeds,
            )
        ]  # fmt: skip
        if statistics.shape != (8, num) or lengths != [num] * 8:
            raise MessageError(
                f"expected {num} entries in every column of the signals and statistics [8, {num}], got "
                f"{', '.join(map(str, lengths))} and {list(statistics.shape)}"
            )
        try:
            columns = b"".join(
                (
                    np.asarray(statistics, _FLOAT).tobytes(),
                    _bytes(expressivity, _FLOAT, "d"),
                    _bytes(health, _FLOAT, "d"),
                    _bytes(latency_ms, _FLOAT, "d"),
                    _packer(1, "d").pack(timestamp) * num,
                    bytes(8 * num),  # chunk_id: a signal is of a whole layer
                    _packer(1, "Q").pack(epoch) * num,
                    _packer(1, "Q").pack(step) * num,
                    _bytes(error_count, _COUNT, "Q"),
                    _bytes(active_seeds, _COUNT, "Q"),
                    _bytes(total_seeds, _COUNT, "Q"),
                    bytes(ready),
                )
            )
        except (ValueError, TypeError, OverflowError, struct_error) as error:
            raise MessageError(f"expected numbers in every column of the signals, but: {error}") from error
        return cls(layer_ids, seed_ids, columns)

    @classmethod
    def of(cls, signals: Sequence[HealthSignal]) -> SignalTable:
        """The table of some signals; a table is returned as it is.

        Raises:
            MessageError: a field has a value of another type.
        """
        if isinstance(signals, SignalTable):
            return signals
        num = len(signals)
        if not num:
            return cls((), (), b"")
        fields = zip(*map(msgspec.structs.astuple, signals), strict=True)
        values = dict(zip(HealthSignal.__struct_fields__, fields, strict=True))
        columns = b""
        for name, (_, _, code) in _PLACES.items():
            try:
                columns += _packer(num, code).pack(*values[name])
            except struct_error as error:
                raise MessageError(
                    f"expected numbers of its type in the field {name} of the signals, but: {error}"
                ) from error
        return cls(values["layer_id"], values["seed_id"], columns)

    @classmethod
    def read(cls, ids: bytes, columns: bytes) -> SignalTable:
        """The table that :attr:`ids` and :attr:`columns` of another hold, after validation.

        Args:
            ids: MessagePack of layer ids and seed ids.
            columns: the block of numbers.

        Raises:
            MessageError: ids that are not two equally long lists of text, a block of another length, a
                number out of its range (``HealthSignal`` names them) or NaN.
        """
        if len(ids) <= _MAX_KEPT_IDS_BYTES:
            layer_ids, seed_ids = _read_ids_once(ids)
        else:
            layer_ids, seed_ids = _read_ids(ids)
        num = len(layer_ids)
        if len(columns) != _SIGNAL_BYTES * num:
            raise MessageError(
                f"expected {_SIGNAL_BYTES} bytes for each of {num} signals, got {len(columns)} bytes"
            )
        floats = np.frombuffer(columns, _FLOAT, len(_RANGES) * num)
        lowest, highest = _bounds(num)
        valid = np.count_nonzero(floats >= lowest) + np.count_nonzero(floats <= highest)
        flags = columns[-num:] if num else b""
        if valid != 2 * len(floats) or flags.count(0) + flags.count(1) != num:
            raise MessageError(_what_is_wrong(layer_ids, seed_ids, floats, lowest, highest))
        return cls(layer_ids, seed_ids, columns)

    @property
    def ids(self) -> bytes:
        """Layer and seed ids as they travel."""
        return _write_ids(self.layer_ids, self.seed_ids)

    @classmethod
    def of_blocks(
        cls,
        layer_ids: Sequence[str],
        seed_ids: Sequence[str],
        floats: NDArray[np.float64],
        counts: NDArray[np.uint64],
        flags: NDArray[np.bool_],
    ) -> SignalTable:
        """The table of what :attr:`blocks` of others gave, columns chosen and joined as one likes.

        Args:
            layer_ids: layer of each signal, ``n`` of them.
            seed_ids: seed of each, empty for a layer's own.
            floats: ``[12, n]``.
            counts: ``[6, n]``.
            flags: ``[1, n]``.
        """
        num = len(layer_ids)
        shapes = (floats.shape, counts.shape, flags.shape)
        assert shapes == ((len(_RANGES), num), (len(_COUNTS), num), (len(_FLAGS), num)), shapes
        return cls(layer_ids, seed_ids, floats.tobytes() + counts.tobytes() + flags.tobytes())

    @cached_property
    def blocks(self) -> tuple[NDArray[np.float64], NDArray[np.uint64], NDArray[np.bool_]]:
        """All columns: ``[12, n]`` float64, ``[6, n]`` uint64 and ``[1, n]`` bool, read-only."""
        return _views(self.columns, len(self.layer_ids))

    def column(self, name: str) -> NDArray[Any]:
        """One numeric field of all signals: ``[n]`` float64, uint64 or bool, read-only.

        Raises:
            KeyError: no such column.
        """
        rows, row, _ = _PLACES[name]
        column: NDArray[Any] = self.blocks[rows][row]
        return column

    def row(self, index: int) -> HealthSignal:
        """One signal, without building the others; ``index`` from 0."""
        values = [rows[:, index].tolist() for rows in self.blocks]
        figures = [values[rows][row] for rows, row in _ORDER]
        return HealthSignal(self.layer_ids[index], self.seed_ids[index], *figures)

    @cached_property
    def signals(self) -> list[HealthSignal]:
        """All signals as objects."""
        values = [rows.tolist() for rows in self.blocks]
        figures = [values[rows][row] for rows, row in _ORDER]
        return list(map(HealthSignal, self.layer_ids, self.seed_ids, *figures))

    def __len__(self) -> int:
        return len(self.layer_ids)

    @overload
    def __getitem__(self, index: int) -> HealthSignal: ...
    @overload
    def __getitem__(self, index: slice) -> list[HealthSignal]: ...
    def __getitem__(self, index: int | slice) -> HealthSignal | list[HealthSignal]:
        return self.signals[index]

    def __iter__(self) -> Iterator[HealthSignal]:
        return iter(self.signals)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SignalTable):
            return self.ids == other.ids and self.columns == other.columns
        return self.signals == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SignalTable({len(self)} signals of {len(set(self.layer_ids))} layers)"


def _bytes(column: NDArray[Any] | Sequence[float], dtype: np.dtype[Any], code: str) -> bytes:
    """One column as it travels; packing a list takes half as long as making an array of it."""
    if isinstance(column, np.ndarray):
        return column.astype(dtype, copy=False).tobytes()
    return _packer(len(column), code).pack(*column)


def _views(block: bytes, num: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The float columns, counts and flags in a block, one a row."""
    floats = np.frombuffer(block, _FLOAT, len(_RANGES) * num)
    counts = np.frombuffer(block, _COUNT, len(_COUNTS) * num, _FLOAT_BYTES * num)
    flags = np.frombuffer(block, _FLAG, len(_FLAGS) * num, (_FLOAT_BYTES + _COUNT_BYTES) * num)
    return (
        floats.reshape(len(_RANGES), num),
        counts.reshape(len(_COUNTS), num),
        flags.reshape(len(_FLAGS), num),
    )


@lru_cache(maxsize=64)
def _packer(num: int, code: str) -> Struct:
    return Struct(f"<{num}{code}")


@lru_cache(maxsize=4)
def _bounds(num: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest value of every number in the float columns of ``num`` signals."""
    lowest, highest = np.array(list(_RANGES.values())).T
    return np.repeat(lowest, num), np.repeat(highest, num)


_written: tuple[Sequence[str], Sequence[str], bytes] = ((), (), msgspec.msgpack.encode(((), ())))
"""The ids that were written last. They are the same tuples from one sampled step of a run to the next."""


def _write_ids(layer_ids: Sequence[str], seed_ids: Sequence[str]) -> bytes:
    global _written
    layers, seeds, ids = _written
    if layers is layer_ids and seeds is seed_ids:
        return ids
    ids = msgspec.msgpack.encode((layer_ids, seed_ids))
    if isinstance(layer_ids, tuple) and isinstance(seed_ids, tuple):  # a list might be changed afterwards
        _written = (layer_ids, seed_ids, ids)
    return ids


def _read_ids(ids: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        layer_ids, seed_ids = _IDS.decode(ids)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"expected MessagePack of layer ids and seed ids, but: {error}") from error
    if len(layer_ids) != len(seed_ids):
        raise MessageError(
            f"expected a seed id (or '') for each of {len(layer_ids)} layer ids, got {len(seed_ids)}"
        )
    return layer_ids, seed_ids


_read_ids_once = lru_cache(maxsize=64)(_read_ids)


def _what_is_wrong(
    layer_ids: Sequence[str],
    seed_ids: Sequence[str],
    floats: NDArray[np.float64],
    lowest: NDArray[np.float64],
    highest: NDArray[np.float64],
) -> str:
    """Name the first number out of its range."""
    wrong = np.flatnonzero(~((floats >= lowest) & (floats <= highest)))
    if not len(wrong):
        return f"expected 0 or 1 in {_FLAGS[0]}, got another byte"
    position = int(wrong[0])
    column, row = divmod(position, len(layer_ids))
    owner = f"layer {layer_ids[row]!r}" + (f", seed {seed_ids[row]!r}" if seed_ids[row] else "")
    return (
        f"expected {list(_RANGES)[column]} in [{lowest[position]:g}, {highest[position]:g}], "
        f"got {floats[position]:g} for {owner}"
    )
