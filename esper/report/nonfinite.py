"""NaN and infinities in JSON, which has no word for them.

msgspec writes them as ``null``, and a diverged loss would come back as "not measured". Two spellings:

- where the schema says *number* (``measurements``, ``numbers``, the figures of a summary) the value is
  the string ``"nan"``, ``"inf"`` or ``"-inf"``;
- where the schema says *anything* (``RunRecord.info``) such a string could be a real one, so the value is
  the object ``{"$float": "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["decode_any", "decode_numbers", "encode_any", "encode_numbers"]

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TAG = "$float"


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def encode_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with non-finite floats spelt as strings; everything else is left alone."""
    return {key: _word(value) if _is_non_finite(value) else value for key, value in values.items()}


def decode_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`encode_numbers`; any other string stays, for the schema to refuse."""
    return {
        key: _WORDS.get(value, value) if isinstance(value, str) else value for key, value in values.items()
    }


def encode_any(value: Any) -> Any:
    """Return ``value`` (dicts, lists, scalars) with non-finite floats tagged, at any depth."""
    if _is_non_finite(value):
        return {_TAG: _word(value)}
    if isinstance(value, dict):
        return {key: encode_any(item) for key, item in value.items()}
    if isinstance(value, list):
        return [encode_any(item) for item in value]
    return value


def decode_any(value: Any) -> Any:
    """Undo :func:`encode_any`."""
    if isinstance(value, dict):
        if value.keys() == {_TAG} and value[_TAG] in _WORDS:
            return _WORDS[value[_TAG]]
        return {key: decode_any(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_any(item) for item in value]
    return value
