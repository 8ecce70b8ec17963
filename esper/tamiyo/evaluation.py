"""Loss of the live model on held-out batches, with and without a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from esper.kasmina.body import Body
from esper.kasmina.seed import Seed
from esper.kasmina.trace import preserved
from esper.tamiyo.host_run import LossOnBatch

__all__ = ["Contribution", "contribution", "mean_loss"]


@dataclass(frozen=True)
class Contribution:
    """Held-out loss with seeds off minus with them on: positive when they help.

    It is measured on the host as it is now, which may have adapted to them; it is not the gain
    over a run that never had them (GROWTH.md §3.5).

    Attributes:
        loss_on: Mean loss with the seeds at full strength.
        differences: Off minus on, one a batch.
    """

    loss_on: float
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference over the batches."""
        return sum(self.differences) / len(self.differences)

    @property
    def stderr(self) -> float:
        """Standard error of the mean over batches; 0 for a single batch."""
        n = len(self.differences)
        if n < 2:
            return 0.0
        mean = self.mean
        return math.sqrt(sum((d - mean) ** 2 for d in self.differences) / (n - 1) / n)


def mean_loss(body: Body, batches: Sequence[LossOnBatch]) -> float:
    """Mean loss over ``batches`` in eval mode; buffers, modes and random state stay as they are."""
    return sum(_losses(body, batches)) / len(batches)


def contribution(body: Body, seeds: Sequence[Seed], batches: Sequence[LossOnBatch]) -> Contribution:
    """Measure what ``seeds`` contribute together, at full strength, on ``batches`` (at least one)."""
    on = _losses(body, batches, seeds, 1.0)
    off = _losses(body, batches, seeds, 0.0)
    return Contribution(sum(on) / len(on), tuple(b - a for a, b in zip(on, off, strict=True)))


def _losses(
    body: Body, batches: Sequence[LossOnBatch], seeds: Sequence[Seed] = (), alpha: float = 1.0
) -> list[float]:
    with ExitStack() as stack:
        stack.enter_context(preserved(body.model))
        stack.enter_context(torch.no_grad())
        for seed in seeds:
            stack.enter_context(seed.overridden(alpha))
        body.model.eval()
        return [float(batch()) for batch in batches]
