"""Metrics of an update, gathered over its optimizer steps by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import ExplainedVariance, MaxMetric, MeanMetric

__all__ = ["UpdateMetrics"]


class UpdateMetrics:
    """Means (and maxima, of names that end in ``/max``) over steps, and the explained variance of the value.

    Names: ``loss/policy``, ``loss/value``, ``loss/urgency``, ``loss/risk``, ``loss/safety``, ``loss/uncertainty``,
    ``loss/total``, ``entropy`` (nats, over available candidates), ``approx_kl`` (to the proximal policy, the
    estimator ``r − 1 − log r`` of Schulman 2020), ``clip_fraction``, ``explained_variance`` (of the targets, each
    minibatch before its step), ``grad_norm`` (before clipping), ``importance/mean``, ``importance/max``
    (proximal over behaviour), ``importance/truncated``, ``replay/age`` (optimizer steps, of what was replayed),
    ``wait_fraction`` (probability of WAIT).
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric | MaxMetric] = {}
        self._explained = ExplainedVariance()
        self._num_targets = 0

    def add(self, step: Mapping[str, Tensor | float], *, values: Tensor, targets: Tensor) -> None:
        """Take one step's numbers; one that is NaN was not measured in it and is left out."""
        for name, value in step.items():
            number = float(value)
            if math.isnan(number):
                continue
            if name not in self._metrics:
                self._metrics[name] = MaxMetric() if name.endswith("/max") else MeanMetric()
            self._metrics[name].update(number)
        self._explained.update(values.detach().cpu(), targets.detach().cpu())
        self._num_targets += len(targets)

    def compute(self) -> dict[str, float]:
        """Every name → number; explained variance only of two targets or more."""
        found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        if self._num_targets > 1:
            found["explained_variance"] = float(torch.as_tensor(self._explained.compute()))
        return found
