"""Lightning callbacks of ``esper train``: show the run, keep its time, and write its last checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from esper.atomic import replacing
from esper.interrupt import StopRequest
from esper.metrics_file import MetricsFile
from esper.report.live import LiveDisplay

__all__ = ["EXAMPLE_SHAPE", "PREVIOUS", "LastCheckpoint", "Progress"]

PREVIOUS = "previous.ckpt"
"""The checkpoint before the last, while a run goes on: a damaged disk may take the last one."""

EXAMPLE_SHAPE = "esper_example_shape"
"""Key under which a checkpoint holds the shape of a batch of inputs, for ``esper export``."""


class Progress(L.Callback):
    """Feed the display, and keep the time that training takes, over interruptions too.

    Args:
        display: What to feed.
        arm: Name of the arm.
        stop: Epochs that were cut short are not shown.
    """

    def __init__(self, display: LiveDisplay, arm: str, stop: StopRequest) -> None:
        self.wall_time_s = 0.0
        self._display, self._arm, self._stop = display, arm, stop
        self._resumed_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the arm, and drop rows of ``metrics.csv`` that this run will write again."""
        self._resumed_at = time.perf_counter()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(trainer.global_step)
        steps = trainer.estimated_stepping_batches
        self._display.arm_started(self._arm, max(0, trainer.max_epochs or 0), int(steps))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        self._display.step(trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's figures."""
        if not self._stop.requested:
            metrics = {name: _number(value) for name, value in trainer.callback_metrics.items()}
            self._display.epoch_ended(trainer.current_epoch, trainer.global_step, metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.wall_time_s = self._elapsed()
        self._resumed_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Time so far, in seconds."""
        return {"wall_time_s": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time of the checkpoint."""
        self.wall_time_s = float(state_dict["wall_time_s"])

    def _elapsed(self) -> float:
        running = time.perf_counter() - self._resumed_at if self._resumed_at else 0.0
        return self.wall_time_s + running


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` every so many epochs, at the end, and when the user wants to stop.

    Lightning's ``ModelCheckpoint`` cannot write in the middle of an epoch on demand. It comes after all
    other callbacks (as every ``Checkpoint`` does), so growth of the same step is in the file.

    Args:
        path: The file.
        every_epochs: Epochs between two writings.
        stop: Asked after every optimizer step.
        example_shape: Of one batch of inputs.
    """

    def __init__(
        self, path: Path, *, every_epochs: int, stop: StopRequest, example_shape: tuple[int, ...]
    ) -> None:
        self.path = path
        self.saved_step: int | None = None
        self._every_epochs, self._stop = every_epochs, stop
        self._example_shape = example_shape
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run begins."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if that was asked for and no gradients are half accumulated."""
        at_boundary = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self._stop.requested and at_boundary and not trainer.should_stop:
            self._save(trainer)
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, if it is time or the run is over."""
        if self._stop.requested and self.saved_step == trainer.global_step:
            return  # the file continues within this epoch; one written here would call it finished
        epoch = trainer.current_epoch + 1
        ends = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if ends or epoch % self._every_epochs == 0:
            self._save(trainer)
        if ends and not self._stop.requested:
            self._previous.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what an export needs to know of the inputs."""
        checkpoint[EXAMPLE_SHAPE] = list(self._example_shape)

    @property
    def _previous(self) -> Path:
        return self.path.with_name(PREVIOUS)

    def _save(self, trainer: L.Trainer) -> None:
        if self.path.exists():
            with replacing(self._previous) as temporary:
                temporary.unlink(missing_ok=True)
                _link_or_copy(self.path, temporary)
        trainer.save_checkpoint(self.path)
        self.saved_step = trainer.global_step


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
