"""How many optimizer steps a fit will take, where Lightning's own estimate leaves something out."""

from __future__ import annotations

import math

import lightning.pytorch as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

__all__ = ["estimated_steps"]


def estimated_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of the whole run; infinite, or negative, where the trainer knows no end.

    Lightning's estimate (2.6) accumulates as many batches in every epoch as in the current one, counts the
    epoch without steps in which stochastic weight averaging renews the statistics of BatchNorm layers, and one
    step a batch under manual optimization, where the batches so far tell how many it takes.

    Args:
        trainer: Fitting; its data are loaded when they have not been.
    """
    steps = trainer.estimated_stepping_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    accumulation = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    renewing = any(
        isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm for c in callbacks
    )
    manual = not trainer.lightning_module.automatic_optimization
    batches = trainer.num_training_batches
    if not (accumulation or renewing or manual) or trainer.max_epochs in (None, -1) or math.isinf(batches):
        return steps
    assert trainer.max_epochs is not None
    epochs = max(trainer.max_epochs - renewing, 1)
    total = sum(math.ceil(batches / _accumulated(trainer, accumulation, epoch)) for epoch in range(epochs))
    if manual:
        total = round(total * _steps_a_batch(trainer))
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def _steps_a_batch(trainer: L.Trainer) -> float:
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return trainer.global_step / batches if batches and trainer.global_step else 1.0


def _accumulated(trainer: L.Trainer, accumulation: GradientAccumulationScheduler | None, epoch: int) -> int:
    if accumulation is None:
        return trainer.accumulate_grad_batches
    return accumulation.get_accumulate_grad_batches(epoch)
