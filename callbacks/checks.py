"""What growth cannot work with, refused before training starts."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from esper.errors import EsperError, UnsupportedError
from esper.kasmina.optimizer import check_optimizer

__all__ = ["check_optimizers", "check_trainer"]


def check_trainer(trainer: L.Trainer, callback_type: type[L.Callback]) -> None:
    """Refuse a trainer whose settings cannot go together with growth.

    Raises:
        UnsupportedError: All conflicts together, each with the way out.
    """
    conflicts = []
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        conflicts.append(
            f"the strategy {type(trainer.strategy).__name__}: seeds would differ between processes; train on one "
            "device, or use policy='off' to watch only"
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            conflicts.append(
                f"the callback {type(callback).__name__}: it pairs parameters by position, and would average a seed "
                "with another layer; leave it out, or average after the last growth"
            )
    if sum(isinstance(callback, callback_type) for callback in callbacks) > 1:
        conflicts.append(f"more than one {callback_type.__name__}: keep one")
    module = trainer.lightning_module
    if not module.automatic_optimization and not is_overridden("validation_step", module):
        conflicts.append(
            "manual optimization without a validation_step: a training step would train while it is measured; "
            "return the loss from validation_step"
        )
    if conflicts:
        raise UnsupportedError("growth cannot work with " + "; and with ".join(conflicts))
    if trainer.ckpt_path and any(isinstance(c, (BatchSizeFinder, LearningRateFinder)) for c in callbacks):
        rank_zero_warn(
            "resuming with BatchSizeFinder or LearningRateFinder: Lightning restores neither the optimizers nor the "
            "progress of the run then; remove the finder to continue where the checkpoint ends"
        )


def check_optimizers(trainer: L.Trainer) -> None:
    """Refuse optimizers that cannot take new parameters.

    Raises:
        UnsupportedError: All of them together.
    """
    refused: list[str] = []
    for optimizer in trainer.optimizers:
        try:
            check_optimizer(optimizer)
        except EsperError as error:
            refused.append(str(error))
    if refused:
        raise UnsupportedError("; ".join(refused))
