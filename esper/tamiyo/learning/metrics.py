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
        self._numbers: dict[str, list[float]] = {}
        self._values: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, step: Mapping[str, Tensor | float], *, values: Tensor, targets: Tensor) -> None:
        """Take one step's numbers; one that is NaN was not measured in it and is left out."""
        for name, value in step.items():
            number = float(value)
            if not math.isnan(number):
                self._numbers.setdefault(name, []).append(number)
        self._values.append(values.detach())
        self._targets.append(targets.detach())

    def compute(self) -> dict[str, float]:
        """Every name → number; explained variance only of two targets or more."""
        found = {}
        for name, numbers in self._numbers.items():
            metric = MaxMetric() if name.endswith("/max") else MeanMetric()
            # all at once: an update of a metric costs as much as a small network's step
            found[name] = float(metric(torch.tensor(numbers, dtype=torch.float64)))
        values, targets = torch.cat(self._values), torch.cat(self._targets)
        if len(targets) > 1:
            explained = ExplainedVariance()(values.cpu(), targets.cpu())
            found["explained_variance"] = float(torch.as_tensor(explained))
        return found
