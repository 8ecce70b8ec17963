"""Loggers by name; what is not installed is asked for only when it is wanted."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger

from esper.errors import ConfigError, MissingExtraError
from esper.metrics_file import MetricsFile
from esper.report.folder import METRICS
from esper.settings import LoggerSettings

__all__ = ["finish_loggers", "make_loggers"]

# kind -> (package that must be there, Lightning's class)
_CLASSES = {
    "wandb": ("wandb", "WandbLogger"),
    "tensorboard": ("tensorboard", "TensorBoardLogger"),
    "mlflow": ("mlflow", "MLFlowLogger"),
}


def make_loggers(
    settings: LoggerSettings, folder: Path, *, run: str, arm: str, config: Mapping[str, Any]
) -> tuple[list[Logger], list[str]]:
    """Return the loggers of one arm, ``metrics.csv`` first, and notes for the user.

    Args:
        settings: Which one.
        folder: Of the arm.
        run: Name of the run that its arms share.
        arm: Name of the arm.
        config: The composed config, kept with the run where the logger can.

    Raises:
        MissingExtraError: Its package is not installed; the text says what to install.
        ConfigError: Its class refuses an option.
    """
    if settings.kind == "none":
        return [], []
    loggers: list[Logger] = [MetricsFile(folder / METRICS)]
    if settings.kind == "csv":
        return loggers, []
    package, class_name = _CLASSES[settings.kind]
    if find_spec(package) is None:
        raise MissingExtraError(
            f"logger={settings.kind} needs the package {package!r}, which is not installed; "
            f'run: pip install "esper[{settings.kind}]"'
        )
    options: dict[str, Any] = {key: value for key, value in settings.options.items() if value is not None}
    notes: list[str] = []
    if settings.kind == "wandb":
        options.update(save_dir=str(folder), name=f"{run}-{arm}", group=run, job_type=arm)
        if not options.get("offline") and not _has_wandb_key() and not os.environ.get("WANDB_MODE"):
            options["offline"] = True
            notes.append(
                "wandb: no key found, so this run is logged offline; later: `wandb login`, then `wandb sync "
                f"{folder}/wandb/offline-run-*`"
            )
    elif settings.kind == "tensorboard":
        options.update(save_dir=str(folder), name="", version="tensorboard")
    else:
        # MLflow's plain folder store is being retired; its SQLite store is one file and needs no server.
        options.setdefault("tracking_uri", f"sqlite:///{folder}/mlflow.db")
        options.update(run_name=f"{run}-{arm}")
    try:
        logger = getattr(import_module("lightning.pytorch.loggers"), class_name)(**options)
    except TypeError as error:
        raise ConfigError(f"logger={settings.kind} does not take these options: {error}") from error
    logger.log_hyperparams(dict(config))
    return [*loggers, logger], notes


def finish_loggers(loggers: list[Logger]) -> None:
    """Close what would otherwise run on into the next arm."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()  # type: ignore[attr-defined]


def _has_wandb_key() -> bool:
    """Whether wandb has a key where `wandb login` puts it, without importing wandb or asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    candidates = [os.environ.get("NETRC") or "~/.netrc", "~/_netrc"]
    path = next((p for p in (Path(c).expanduser() for c in candidates) if p.is_file()), None)
    if path is None:
        return False
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False  # wandb cannot use such a file either
