"""The baseline for a graph network: gradient boosting on flat features of a candidate and the layers it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.tamiyo.learning.decision_metrics import Floats, decision_metrics
from esper.tamiyo.learning.packed import PackedGraph
from esper.tamiyo.learning.rows import ValueRow

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingRegressor

__all__ = ["BoostedValues", "flat_features"]


def flat_features(graph: PackedGraph) -> NDArray[np.float32]:
    """Features [C, G + F + 2·16] of every candidate: the run's, its own, and its layers'.

    Source and target layers are averaged over a candidate's placements; NaN where it has none, as WAIT.
    """
    parts = graph.parts
    num = graph.num_candidates
    layers = parts["x"][parts["placement_index"]]  # [2, M, 16]
    count = np.bincount(parts["placement_candidate"], minlength=num).astype(np.float32)[:, None]
    sums = np.zeros((2, num, layers.shape[2]), dtype=np.float32)
    for side in range(2):
        np.add.at(sums[side], parts["placement_candidate"], layers[side])
    means = np.where(count > 0, sums / np.maximum(count, 1), np.float32(np.nan))
    run = np.repeat(parts["global_features"], num, axis=0)
    return np.concatenate([run, parts["candidate_attr"], *means], axis=1)


class BoostedValues:
    """Boosted trees that predict a candidate's utility; WAIT's is 0 by definition.

    Args:
        learning_rate: Shrinkage of each tree.
        max_iterations: Trees at most; the validation rows say how many.
        max_leaf_nodes: Of a tree.
        l2: Regularisation of leaves.
        stderr_floor: As in :class:`~esper.tamiyo.learning.config.SupervisedConfig`.
        seed: Of binning.

    Attributes:
        num_iterations: Trees in use.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 0.05,
        max_iterations: int = 400,
        max_leaf_nodes: int = 15,
        l2: float = 1.0,
        stderr_floor: float = 0.01,
        seed: int = 0,
    ) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.stderr_floor = stderr_floor
        self.max_iterations = max_iterations
        self.num_iterations = 0
        self._model: HistGradientBoostingRegressor = HistGradientBoostingRegressor(
            learning_rate=learning_rate,
            max_iter=max_iterations,
            max_leaf_nodes=max_leaf_nodes,
            l2_regularization=l2,
            early_stopping=False,  # its own hold-out would split the states of a host
            random_state=seed,
        )

    def fit(self, train: Sequence[ValueRow], validation: Sequence[ValueRow]) -> dict[str, float]:
        """Fit, keep as many trees as have the smallest weighted squared error on ``validation``; its metrics.

        Raises:
            DataFormatError: No candidate but WAIT was tried in one of the sets.
        """
        x, y, weight = self._table(train)
        x_validation, y_validation, weight_validation = self._table(validation)
        self._model.set_params(max_iter=self.max_iterations).fit(x, y, sample_weight=weight)
        errors = [
            np.average((p - y_validation) ** 2, weights=weight_validation)
            for p in self._model.staged_predict(x_validation)
        ]
        self.num_iterations = 1 + int(np.argmin(errors))
        # nothing is subsampled, so these are the first trees of those above
        self._model.set_params(max_iter=self.num_iterations).fit(x, y, sample_weight=weight)
        return self.evaluate(validation)

    def predict(self, rows: Sequence[ValueRow]) -> list[Floats]:
        """Utilities against WAIT, in nats: of each row [C]."""
        features = [flat_features(row.graph) for row in rows]
        flat = self._model.predict(np.concatenate(features)).astype(np.float64)
        found = np.split(flat, np.cumsum([len(f) for f in features])[:-1])
        for own in found:
            own[0] = 0.0
        return found

    def evaluate(self, rows: Sequence[ValueRow]) -> dict[str, float]:
        """Metrics of :func:`~esper.tamiyo.learning.decision_metrics.decision_metrics`."""
        return decision_metrics(self.predict(rows), rows)

    def _table(self, rows: Sequence[ValueRow]) -> tuple[NDArray[np.float32], Floats, Floats]:
        counted = [row.tried & (np.arange(row.utility.size) > 0) for row in rows]
        if not any(c.any() for c in counted):
            raise DataFormatError(
                f"expected candidates other than WAIT that were tried, got none in {len(rows)} rows"
            )
        pairs = list(zip(rows, counted, strict=True))
        stderr = np.concatenate([row.stderr[c] for row, c in pairs])
        floor = self.stderr_floor**2
        return (
            np.concatenate([flat_features(row.graph)[c] for row, c in pairs]),
            np.concatenate([row.utility[c] for row, c in pairs]),
            floor / (stderr**2 + floor),
        )
