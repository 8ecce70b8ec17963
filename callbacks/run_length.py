"""How many optimizer steps a fit will take, where Lightning's own estimate leaves a callback out."""

from __future__ import annotations

import math

import lightning.pytorch as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

__all__ = ["estimated_steps"]


def estimated_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run; infinite, or negative, where the trainer knows no end.

    Lightning's estimate (2.6) accumulates as many batches in every epoch as in the current one, and counts the
    epoch without steps in which stochastic weight averaging renews the statistics of BatchNorm layers.

    Args:
        trainer: Fitting; its data are loaded when they have not been.
    """
    steps = trainer.estimated_stepping_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    accumulation = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    renewing = any(
        isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm for c in callbacks
    )
    batches = trainer.num_training_batches
    if (accumulation is None and not renewing) or trainer.max_epochs in (None, -1) or math.isinf(batches):
        return steps
    assert trainer.max_epochs is not None
    epochs = trainer.max_epochs - renewing
    total = sum(
        math.ceil(batches / _accumulated(trainer, accumulation, epoch)) for epoch in range(max(epochs, 1))
    )
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def _accumulated(trainer: L.Trainer, accumulation: GradientAccumulationScheduler | None, epoch: int) -> int:
    if accumulation is None:
        return trainer.accumulate_grad_batches
    return accumulation.get_accumulate_grad_batches(epoch)
