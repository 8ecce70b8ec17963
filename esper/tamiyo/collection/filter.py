"""Which health signals are worth processing: errors, readiness, anomalies, and a tenth of the rest.

A signal is anomalous when its health score x deviates from the mean of the last n scores of the same layer
or seed by more than k standard deviations::

    (x - mean)² > k² max(σ², σ_floor²),      mean = S/n,   σ² = Q/n - mean²,   S = Σx, Q = Σx²

which is computed without division as ``(n x - S)² > k² max(n Q - S², n² σ_floor²)``. Scores are whole
multiples of 2⁻²⁰ here, so S and Q are exact integers: adding the new score and taking the oldest one out
for days gathers no error, and one signal at a time or a table at once gives the same answer to the last bit.

The floor matters where a history is flat (σ = 0): without it every change in the last digit would be an
anomaly. The history of a series says nothing before it has ``min_history`` scores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError, MessageError
from esper.messages import HealthSignal
from esper.signal_table import SignalTable
from esper.tamiyo.collection.keys import Keys, KeyTable
from esper.tamiyo.collection.priority import Priority

__all__ = ["SignalFilterEngine"]

_SCALE = 1 << 20
_MAX_HISTORY = 2000  # (n x)² in units of 2⁻²⁰ stays below 2⁶³
_FIRST_SIZE = 64


class SignalFilterEngine:
    """Decides for each signal whether it passes, and for what.

    The document counts ``len(history) % 10``, and a full history has 100 entries for ever: after that every
    normal signal would pass. Here each series counts its normal signals; the first passes, then every tenth.

    Signals with errors stay out of the history: their score is 0 by definition and says nothing about what is
    normal. All others enter it, anomalies too, so that a new level becomes the normal one.

    Args:
        anomaly_threshold: k, in standard deviations.
        history_size: Scores kept of each series.
        normal_every: One in so many normal signals passes.
        min_history: Scores before anything can be an anomaly.
        sigma_floor: Least standard deviation, in units of the health score.
        keys: Table of the series; one of its own by default.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        anomaly_threshold: float = 2.0,
        *,
        history_size: int = 100,
        normal_every: int = 10,
        min_history: int = 10,
        sigma_floor: float = 0.01,
        keys: KeyTable | None = None,
    ) -> None:
        if not (math.isfinite(anomaly_threshold) and anomaly_threshold > 0):
            raise ConfigError(f"expected a positive anomaly_threshold, got {anomaly_threshold}")
        if not 2 <= history_size <= _MAX_HISTORY:
            raise ConfigError(f"expected a history_size of 2 to {_MAX_HISTORY} scores, got {history_size}")
        if not 2 <= min_history <= history_size:
            raise ConfigError(
                f"expected min_history from 2 to history_size={history_size}, got {min_history}"
            )
        if normal_every < 1:
            raise ConfigError(f"expected normal_every of at least 1, got {normal_every}")
        if not 0 < sigma_floor <= 1:
            raise ConfigError(f"expected sigma_floor in (0, 1], got {sigma_floor}")
        self.anomaly_threshold = anomaly_threshold
        self.history_size = history_size
        self.normal_every = normal_every
        self.min_history = min_history
        self.sigma_floor = sigma_floor
        self.keys = keys if keys is not None else KeyTable()
        self.keys.follow(self._forget)
        self._squared_threshold = float(anomaly_threshold) ** 2
        self._squared_floor = round((sigma_floor * _SCALE) ** 2)
        self._scores = np.zeros((_FIRST_SIZE, history_size), dtype=np.int32)
        self._sums, self._squares, self._lengths, self._heads, self._turns = np.zeros(
            (5, _FIRST_SIZE), dtype=np.int64
        )

    def should_process(self, signal: HealthSignal, run_id: str = "") -> bool:
        """Whether one signal passes; it counts as seen.

        Args:
            signal: The signal.
            run_id: Its run: layers of the same name in different runs have nothing to do with each other.

        Raises:
            MessageError: the health score is not in [0, 1].
        """
        return self.priority(signal, run_id) != Priority.THINNED

    def priority(self, signal: HealthSignal, run_id: str = "") -> Priority:
        """What one signal passes for, ``THINNED`` when it does not; it counts as seen.

        Raises:
            MessageError: the health score is not in [0, 1].
        """
        if not 0 <= signal.health_score <= 1:
            raise MessageError(_wrong_score(signal.health_score, signal.layer_id))
        key = self.keys.of(run_id, signal.layer_id, signal.seed_id)
        return self._one(key, signal.error_count > 0, signal.is_ready_for_transition, signal.health_score)

    def priorities(self, table: SignalTable, run_id: str = "", *, keys: Keys | None = None) -> NDArray[Any]:
        """What each signal of a table passes for, as :meth:`priority` says one after the other.

        Args:
            table: ``n`` signals of one run.
            run_id: The run.
            keys: Of the table, where the caller has them already.

        Returns:
            ``[n]`` int64, values of :class:`Priority`.

        Raises:
            MessageError: a health score is not in [0, 1]; then none counts as seen.
        """
        scores = table.column("health_score")
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            worst = int(np.flatnonzero(~((scores >= 0) & (scores <= 1)))[0])
            raise MessageError(_wrong_score(float(scores[worst]), table.layer_ids[worst]))
        which, distinct = (
            keys if keys is not None else self.keys.of_table(run_id, table.layer_ids, table.seed_ids)
        )
        errors = table.column("error_count") > 0
        ready = table.column("is_ready_for_transition")
        if not distinct:  # a series that comes twice has to be looked at in order; probes never send that
            rows = zip(which.tolist(), errors.tolist(), ready.tolist(), scores.tolist(), strict=True)
            return np.array([self._one(*row) for row in rows], dtype=np.int64)
        if not len(which):
            return np.zeros(0, dtype=np.int64)
        self._make_room(int(which.max()))
        return self._many(which, errors, ready, scores)

    def history(self, layer_id: str, seed_id: str = "", run_id: str = "") -> list[float]:
        """Health scores kept of one series, oldest first, to the nearest 2⁻²⁰."""
        key = self.keys.of_run(run_id).get((layer_id, seed_id))
        if key is None or key >= len(self._lengths):
            return []
        length, head = int(self._lengths[key]), int(self._heads[key])
        places = (head - length + np.arange(length)) % self.history_size
        scores: list[float] = (self._scores[key, places] / _SCALE).tolist()
        return scores

    def _one(self, key: int, error: bool, ready: bool, health_score: float) -> Priority:
        self._make_room(key)
        score = round(health_score * _SCALE)  # to even, as numpy.rint
        length, total, squares = int(self._lengths[key]), int(self._sums[key]), int(self._squares[key])
        deviation = length * score - total
        spread = max(length * squares - total * total, length * length * self._squared_floor)
        anomalous = length >= self.min_history and (
            float(deviation * deviation) > self._squared_threshold * float(spread)
        )
        if not error:
            head = int(self._heads[key])
            oldest = int(self._scores[key, head])  # 0 where the history is not full
            self._scores[key, head] = score
            self._sums[key] = total + score - oldest
            self._squares[key] = squares + score * score - oldest * oldest
            self._heads[key] = (head + 1) % self.history_size
            self._lengths[key] = min(length + 1, self.history_size)
        if error:
            return Priority.ERROR
        if ready:
            return Priority.READY
        if anomalous:
            return Priority.ANOMALY
        turn = int(self._turns[key])
        self._turns[key] = (turn + 1) % self.normal_every
        return Priority.THINNED if turn else Priority.NORMAL

    def _many(
        self, keys: NDArray[np.int64], errors: NDArray[Any], ready: NDArray[Any], health: NDArray[Any]
    ) -> NDArray[Any]:
        """:meth:`_one` for series that are all different, by columns."""
        scores = np.rint(health * _SCALE).astype(np.int64)
        lengths, totals, squares = self._lengths[keys], self._sums[keys], self._squares[keys]
        deviation = lengths * scores - totals
        spread = np.maximum(lengths * squares - totals * totals, lengths * lengths * self._squared_floor)
        beyond = (deviation * deviation).astype(np.float64) > self._squared_threshold * spread.astype(
            np.float64
        )
        anomalous = beyond & (lengths >= self.min_history)

        turns = self._turns[keys]
        special = errors | ready | anomalous
        self._turns[keys] = np.where(special, turns, (turns + 1) % self.normal_every)
        found = np.where(turns == 0, int(Priority.NORMAL), int(Priority.THINNED))
        found[anomalous] = Priority.ANOMALY
        found[ready] = Priority.READY
        found[errors] = Priority.ERROR

        if errors.any():
            kept = ~errors
            keys, scores, lengths = keys[kept], scores[kept], lengths[kept]
            totals, squares = totals[kept], squares[kept]
        heads = self._heads[keys]
        oldest = self._scores[keys, heads].astype(np.int64)
        self._scores[keys, heads] = scores
        self._sums[keys] = totals + scores - oldest
        self._squares[keys] = squares + scores * scores - oldest * oldest
        self._heads[keys] = (heads + 1) % self.history_size
        self._lengths[keys] = np.minimum(lengths + 1, self.history_size)
        return found

    def _make_room(self, key: int) -> None:
        while key >= len(self._lengths):
            for name in ("_scores", "_sums", "_squares", "_lengths", "_heads", "_turns"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate((column, np.zeros_like(column))))

    def _forget(self, keys: NDArray[np.int64]) -> None:
        keys = keys[keys < len(self._lengths)]
        for column in (self._scores, self._sums, self._squares, self._lengths, self._heads, self._turns):
            column[keys] = 0


def _wrong_score(score: float, layer_id: str) -> str:
    return f"expected health_score in [0, 1], got {score} for layer {layer_id!r}"
