"""One arm of a run: a host trained once, with growth or as a control, on the run's seed and data order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.utils import instantiate

from esper.callbacks import TamiyoCallback
from esper.callbacks.checkpoint_io import AtomicCheckpointIO
from esper.errors import ConfigError
from esper.hosts import ClassifierModule, HostConfig, HostData, LanguageModule, ShakespeareData
from esper.interrupt import StopRequest
from esper.loggers import finish_loggers, make_loggers
from esper.progress import LastCheckpoint, Progress
from esper.report.folder import JOURNAL, METRICS
from esper.report.live import LiveDisplay
from esper.report.summary import ArmSummary
from esper.settings import TrainSettings
from esper.tamiyo.config import TamiyoConfig, build_config

__all__ = ["CHECKPOINT", "Arm", "ArmResult", "control_growth", "run_arm", "saved_host"]

CHECKPOINT = "checkpoints/last.ckpt"
"""Where an arm's resumable checkpoint lies in its folder."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """What is trained, and where it leaves its files.

    Attributes:
        name: As tables show it.
        host: Its network, fitted to the data.
        growth: Settings of its callback; policy ``off`` for a control.
        folder: For checkpoint, metrics and journal.
        checkpoint: To continue from; None to begin.
    """

    name: str
    host: HostConfig
    growth: TamiyoConfig
    folder: Path
    checkpoint: Path | None = None


@dataclass(frozen=True)
class ArmResult:
    """A trained arm; ``summary`` is None when it was stopped before its end."""

    module: ClassifierModule
    summary: ArmSummary | None


def control_growth(seed: int) -> TamiyoConfig:
    """Settings of a control: no growth, no bus and no probes, but the same account of FLOPs."""
    return build_config(policy="off", bus=None, seed=seed, probes={"interval_steps": 0})


def run_arm(
    arm: Arm,
    settings: TrainSettings,
    data: HostData,
    display: LiveDisplay,
    stop: StopRequest,
    *,
    run: Path,
    config: Mapping[str, Any],
) -> ArmResult:
    """Train one arm, and read the test split once.

    Args:
        arm: What to train.
        settings: Of the whole run.
        data: Shared by all arms, so that it is read once; its order depends on seed and epoch alone.
        display: Shows it.
        stop: Asked after every step.
        run: The run folder.
        config: The composed config as plain values, for loggers.
    """
    L.seed_everything(settings.seed, workers=True, verbose=False)
    module_class = LanguageModule if isinstance(data, ShakespeareData) else ClassifierModule
    module = module_class(arm.host, settings.optim)
    initial_parameters = module.host.num_parameters
    growing = arm.growth.policy != "off"
    callback = TamiyoCallback(
        arm.growth, journal=str(arm.folder / JOURNAL), listeners=[display.event] if growing else []
    )
    progress = Progress(display, arm.name, stop)
    checkpoint = LastCheckpoint(
        arm.folder / CHECKPOINT,
        every_epochs=settings.callbacks.checkpoint_every_epochs,
        stop=stop,
        example_shape=(2, *data.input_shape),
    )
    loggers, notes = make_loggers(settings.logger, arm.folder, run=run.name, arm=arm.name, config=config)
    for note in notes:
        _log.warning(note)
    trainer = L.Trainer(
        **settings.trainer.lightning_arguments(),
        default_root_dir=arm.folder,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[callback, progress, *_extra(settings.callbacks.extra), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=None if arm.checkpoint is None else str(arm.checkpoint),
            weights_only=True if arm.checkpoint is not None else None,
        )
        if stop.requested and checkpoint.saved_step is not None and not _is_over(trainer, settings):
            return ArmResult(module, None)
        counts = callback.summary()
        tested = trainer.test(module, datamodule=data, verbose=False)[0]
    finally:
        finish_loggers(loggers)
    summary = ArmSummary(
        name=arm.name,
        policy=arm.growth.policy if growing else "",
        accuracy=tested["test_acc"],
        loss=tested["test_loss"],
        parameters=int(counts["num_parameters"]),
        trainable_parameters=int(counts["trainable_parameters"]),
        initial_parameters=initial_parameters,
        training_flops=float(counts["training_flops"]),
        wall_time_s=progress.wall_time_s,
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        germinated=int(counts["seeds_germinated"]) if growing else None,
        fossilized=int(counts["seeds_fossilized"]) if growing else None,
        culled=int(counts["seeds_culled"]) if growing else None,
        metrics=str((arm.folder / METRICS).relative_to(run)) if settings.logger.kind != "none" else None,
    )
    return ArmResult(module, summary)


def _is_over(trainer: L.Trainer, settings: TrainSettings) -> bool:
    """Whether the stop came when nothing was left to do."""
    steps = settings.trainer.max_steps
    return trainer.global_step >= (steps if steps > 0 else trainer.estimated_stepping_batches)


def _extra(specs: Mapping[str, Mapping[str, Any]]) -> Sequence[L.Callback]:
    """Make the further callbacks.

    Raises:
        ConfigError: One cannot be made, or is no Lightning callback.
    """
    callbacks = []
    for name, spec in specs.items():
        try:
            callback = instantiate(spec)
        except Exception as error:  # Hydra wraps whatever the constructor raised
            raise ConfigError(f"callbacks.extra.{name} cannot be made: {error}") from error
        if not isinstance(callback, L.Callback):
            raise ConfigError(f"callbacks.extra.{name} should be a Lightning callback, got {type(callback)}")
        callbacks.append(callback)
    return callbacks


def saved_host(checkpoint: Path) -> Mapping[str, Any] | None:
    """Return the host config that a checkpoint of :func:`run_arm` holds, as plain values; None without one."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return content.get("hyper_parameters", {}).get("host")
