"""Lightning's fine-tuning callbacks beside a run that is resumed."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.callbacks import BaseFinetuning

__all__ = ["restore_groups"]


def restore_groups(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let fine-tuning callbacks make the parameter groups of the checkpoint now, wherever they stand in the list.

    They do it in ``on_fit_start``, the first time after a checkpoint was loaded, from the names that parameters
    had at the start of an epoch; seeds that grew later are not among them. The full lists are restored after
    that, which takes as many groups as there were.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and callback._restarting:
            callback.on_fit_start(trainer, module)
