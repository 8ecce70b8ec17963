"""Health over time: what a window of signals says of each layer, and which layers are in trouble."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from esper.tamiyo.graph.features import Column

if TYPE_CHECKING:
    from esper.messages import HealthSignal

__all__ = ["SignalWindow", "problems"]

LOW_HEALTH = 0.3
"""Mean health under which a layer is in trouble."""
FALLING = -0.25
"""Change of the health along its line over the window under which a layer is in trouble."""
SLOW = 2.0
"""Times its own baseline that a layer may take."""
_ENOUGH = 5
"""Signals from which on a slope or a baseline is believed."""
_LARGEST = 1e30


class SignalWindow:
    """The last signals of each of N layers, as columns; signals of seeds and of other layers are left out.

    Args:
        signals: In any order; a layer's are put in the order of their steps.
        names: Of the layers.
        size: Signals of one layer that count: the last so many.

    Attributes:
        count: Signals of each layer within the window [N].
        mean_health: [N]; 0 where a layer never spoke.
        slope: Least-squares slope of the health, a sampled step [N].
        spread: Standard deviation of the health [N].
        errors: Errors within the window [N].
        latency: Last execution latency over the mean of those before, 1 where there are too few [N].
    """

    def __init__(self, signals: Sequence[HealthSignal], names: Sequence[str], size: int) -> None:
        self.names = names
        num = len(names)
        index = {name: i for i, name in enumerate(names)}
        known = [signal for signal in signals if not signal.seed_id and signal.layer_id in index]
        layer = np.fromiter((index[signal.layer_id] for signal in known), np.int64, len(known))
        steps = np.fromiter(map(attrgetter("step"), known), np.float64, len(known))
        order = np.lexsort((steps, layer))
        layer = layer[order]
        counts = np.bincount(layer, minlength=num)
        starts = np.cumsum(counts) - counts
        age = counts[layer] - 1 - (np.arange(len(layer)) - starts[layer])  # 0: the layer's last
        kept = age < size
        self._signals = [known[i] for i in order[kept].tolist()]
        self._layer, age = layer[kept], age[kept]
        self.count = np.minimum(counts, size)
        self._last = np.cumsum(self.count) - 1  # row of each layer's last signal
        self._lasts: dict[str, Column] = {}
        rows = np.maximum(self.count, 1)
        health = self._column("health_score")
        self.mean_health = self._sum(health) / rows
        x = (self.count[self._layer] - 1) / 2.0 - age
        deviation = health - self.mean_health[self._layer]
        self.slope: Column = self._sum(x * deviation) / np.maximum(self._sum(x * x), 1e-12)
        self.spread = np.sqrt(self._sum(deviation * deviation) / rows)
        self.errors = self._sum(self._column("error_count"))
        latency = self._column("execution_latency")
        earlier = self._sum(np.where(age > 0, latency, 0.0)) / np.maximum(self.count - 1, 1)
        comparable = (self.count >= _ENOUGH) & (earlier > 0)
        self.latency = np.where(
            comparable, self.last("execution_latency") / np.where(comparable, earlier, 1.0), 1.0
        )

    @property
    def change(self) -> Column:
        """Change of the health along its line over the window [N]."""
        steps = np.maximum(self.count.astype(np.float64) - 1.0, 0.0)
        return self.slope * steps

    @property
    def heard(self) -> NDArray[np.bool_]:
        """Which layers spoke [N]."""
        return self.count > 0

    def last(self, field: str) -> Column:
        """A field of each layer's last signal [N]; 0 where it never spoke."""
        if field not in self._lasts:
            spoke = np.flatnonzero(self.heard)
            values = np.zeros(len(self.names))
            values[spoke] = [getattr(self._signals[i], field) for i in self._last[spoke]]
            self._lasts[field] = _bounded(values)
        return self._lasts[field]

    def trends(self) -> dict[str, float]:
        """Layer -> slope of its health score, a sampled step; layers that never spoke are left out."""
        return {
            name: float(slope)
            for name, slope, spoke in zip(self.names, self.slope, self.heard, strict=True)
            if spoke
        }

    def _column(self, field: str) -> Column:
        found = map(attrgetter(field), self._signals)
        return _bounded(np.fromiter(found, np.float64, len(self._signals)))

    def _sum(self, values: Column) -> Column:
        total = np.bincount(self._layer, weights=values, minlength=len(self.names))
        return np.asarray(total, np.float64)


def problems(window: SignalWindow) -> dict[str, str]:
    """Layer -> in words what is wrong: low mean health, errors, falling health, slower than it used to be.

    A slope and a baseline are believed from five signals on.
    """
    found: dict[str, list[str]] = {}
    enough = window.count >= _ENOUGH
    low = window.heard & (window.mean_health < LOW_HEALTH)
    falling = enough & (window.change < FALLING)
    bad = low | (window.errors > 0) | falling | (window.latency > SLOW)
    for i in np.flatnonzero(bad).tolist():
        reasons = found.setdefault(window.names[i], [])
        if low[i]:
            reasons.append(f"its mean health is {window.mean_health[i]:.2f}, under {LOW_HEALTH:g}")
        if window.errors[i] > 0:
            reasons.append(f"{window.errors[i]:.0f} errors in {window.count[i]} sampled steps")
        if falling[i]:
            reasons.append(f"its health falls by {-window.slope[i]:.3g} a sampled step")
        if window.latency[i] > SLOW:
            reasons.append(f"it takes {window.latency[i]:.1f} times as long as before")
    return {name: "; ".join(reasons) for name, reasons in found.items()}


def _bounded(values: Column) -> Column:
    """Finite, and small enough to be squared; NaN counts as 0."""
    return np.clip(np.nan_to_num(values, nan=0.0), -_LARGEST, _LARGEST)
