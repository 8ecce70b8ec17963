"""Numbers as people read them. ``None`` (does not apply) is shown as an en dash everywhere."""

from __future__ import annotations

import math

__all__ = ["DASH", "count", "duration", "loss", "number", "percent", "scaled"]

DASH = "\N{EN DASH}"


def number(value: float | None) -> str:
    """Up to four significant digits, for sentences: ``3.1``, ``0.1234``, ``120``, ``1.2e-05``, ``nan``."""
    if value is None:
        return DASH
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}"


def loss(value: float | None) -> str:
    """A loss with decimals that line up in a column: ``0.1234``, ``12.346``, ``1.2e-05``."""
    if value is None:
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.3f}" if 10 <= abs(value) < 1000 else f"{value:.2g}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal: ``0.957`` is ``95.7 %``."""
    return DASH if value is None else f"{100 * value:.1f} %"


def count(value: int | None) -> str:
    """A count with thousands separated: ``12,345``."""
    return DASH if value is None else f"{value:,}"


def scaled(value: float | None) -> str:
    """Three digits with an SI prefix: ``1.23 M``; below a thousand the plain number."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(float(value))
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # .9995 so that 999 999 becomes 1.00 M rather than 1000 k
        if abs(value) >= 0.9995 * 10**power:
            ratio = value / 10**power
            return f"{ratio:.{2 if abs(ratio) < 9.995 else 1 if abs(ratio) < 99.95 else 0}f} {prefix}"
    return f"{value:.0f}"


def duration(value: float | None) -> str:
    """Seconds as ``8.1 s``, ``3 m 20 s`` or ``2 h 05 m``."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(float(value))
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} m {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m"
