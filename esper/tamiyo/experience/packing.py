"""Structs to bytes and back, checked both ways.

msgpack, then zlib, whose checksum tells a damaged byte from a sound one.
"""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import msgspec

from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.experience.records import DecisionFacts

__all__ = ["check_choice", "check_decision", "compress", "pack", "unpack"]

_LEVEL = 1  # floats hardly shrink, and higher levels take longer
_MAX_BYTES = 256 << 20
"""Unpacked; more is no decision point, but a bomb."""
_MAX_NAME = 200

_StructT = TypeVar("_StructT")


def pack(value: object) -> bytes:
    """Bytes of any struct.

    Raises:
        ConfigError: A field holds what its type does not allow, such as a number beyond 64 bits.
    """
    try:
        return compress(msgspec.msgpack.encode(value))
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise ConfigError(f"a {type(value).__name__.lstrip('_')} cannot be stored: {error}") from error


def compress(raw: bytes) -> bytes:
    """Add the checksum."""
    return zlib.compress(raw, _LEVEL)


def unpack(data: object, kind: type[_StructT], where: str) -> _StructT:
    """The struct of type ``kind`` in ``data``.

    Args:
        data: What :func:`pack` returned.
        kind: Its type.
        where: File and row, for the error.

    Raises:
        DataFormatError: It is something else, or damaged.
    """
    try:
        if not isinstance(data, bytes):
            raise ValueError(f"expected bytes, got {type(data).__name__}")
        reader = zlib.decompressobj()
        raw = reader.decompress(data, _MAX_BYTES)
        if not reader.eof or reader.unused_data:
            raise ValueError(
                f"{len(data)} bytes that are cut off, too long, or unpack to more than {_MAX_BYTES}"
            )
        return msgspec.msgpack.decode(raw, type=kind)
    except (zlib.error, msgspec.MsgspecError, ValueError) as error:
        raise DataFormatError(
            f"{where}: expected packed {getattr(kind, '__name__', kind)}, got something else: {error}; the store is "
            "damaged, or another program has written to it"
        ) from error


def check_decision(facts: DecisionFacts) -> None:
    """Refuse what would not read back, or what nobody could learn from.

    Structs are not checked when they are made, so this one is taken apart and put together again.

    Raises:
        ConfigError: With what is wrong.
    """
    check_choice(facts)
    try:
        msgspec.convert(msgspec.to_builtins(facts), DecisionFacts)
    except (msgspec.MsgspecError, TypeError) as error:
        raise ConfigError(f"decision {facts.decision_id!r:.80} cannot be stored: {error}") from error


def check_choice(facts: DecisionFacts) -> None:
    """Check what no type can: that the choice is one of the candidates, and drawn with a probability.

    Raises:
        ConfigError: With everything that is wrong.
    """
    point = facts.point
    mistakes = []
    for name in ("decision_id", "policy", "run_id"):
        value = getattr(facts, name)
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
            mistakes.append(f"{name} should be a text of 1 to {_MAX_NAME} characters, got {value!r:.80}")
    if not point.candidates or point.candidates[0].action != "wait":
        mistakes.append("the first candidate should be WAIT")
    elif not 0 <= facts.chosen < len(point.candidates):
        mistakes.append(f"chosen should be one of {len(point.candidates)} candidates, got {facts.chosen}")
    elif facts.candidate.unavailable:
        mistakes.append(
            f"candidate {facts.chosen} was chosen, which may not be: {facts.candidate.unavailable}"
        )
    if not math.isfinite(facts.logprob) or facts.logprob > 1e-6:  # a softmax may round to just above 0
        mistakes.append(f"logprob should be the logarithm of a probability, got {facts.logprob}")
    if mistakes:
        raise ConfigError(f"decision {facts.decision_id!r:.80} cannot be stored: {'; '.join(mistakes)}")
