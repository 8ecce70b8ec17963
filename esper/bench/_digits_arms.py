"""One run of ``esper bench growth``: a digits MLP trained by Lightning, with or without growth."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import lightning.pytorch as L
import torch

from esper.arms import control_growth
from esper.callbacks import TamiyoCallback
from esper.hosts import ClassifierModule, DigitsData, MLPConfig, OptimConfig
from esper.tamiyo.config import build_config

__all__ = ["DigitsRun", "quiet_worker", "train_digits"]

OPTIM = OptimConfig(lr=0.05, weight_decay=0.3)
"""Tuned on the validation split for the untouched host (tests/hosts has the host's default beside it)."""


@dataclass(frozen=True)
class DigitsRun:
    """What to train.

    Attributes:
        arm: Name in the tables.
        host: Seed of host shape, initial weights, data order and growth.
        hidden: Widths of the host.
        policy: Registered policy; ``off`` for a control.
        mode: Lifecycle of the seeds.
        lr_factor: On the learning rate.
        epochs: Length of the run.
        budget_ratio: Parameters allowed, over the host's.
    """

    arm: str
    host: int
    hidden: tuple[int, ...]
    policy: str = "off"
    mode: str = "direct"
    lr_factor: float = 1.0
    epochs: int = 40
    budget_ratio: float = 2.0


def quiet_worker() -> None:
    """Prepare a worker process: one thread, no advice from Lightning."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")


@lru_cache(maxsize=1)
def _data() -> DigitsData:
    return DigitsData()


def train_digits(run: DigitsRun) -> dict[str, Any]:
    """Train and evaluate; a run that fails is reported, not dropped.

    Returns:
        Plain values: the run's name and seed, ``val_loss``, ``val_acc``, ``test_loss``, ``test_acc``,
        ``parameters``, ``training_flops``, the seeds' counts, ``wall_time_s``; or ``error``.
    """
    started = time.perf_counter()
    row: dict[str, Any] = {
        "arm": run.arm, "host": run.host, "hidden": list(run.hidden), "policy": run.policy, "mode": run.mode,
    }  # fmt: skip
    try:
        row |= _train(run)
    except Exception as error:  # one failed run must not cost the other six hundred; the table counts it
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"wall_time_s": time.perf_counter() - started}


def _train(run: DigitsRun) -> Mapping[str, Any]:
    config = control_growth(run.host)
    if run.policy != "off":
        config = build_config(
            policy=run.policy,
            seed=run.host,
            bus=None,
            budget={"max_parameters_ratio": run.budget_ratio},
            probes={"interval_steps": 50, "log_health": False},
            lifecycle={"mode": run.mode},
        )
    L.seed_everything(run.host, workers=True, verbose=False)
    module = ClassifierModule(MLPConfig(hidden=run.hidden), replace(OPTIM, lr=OPTIM.lr * run.lr_factor))
    data = _data()
    data.seed = run.host
    with tempfile.TemporaryDirectory() as folder:
        callback = TamiyoCallback(config)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=run.epochs,
            check_val_every_n_epoch=run.epochs,
            default_root_dir=folder,
            logger=False,
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
        counts = callback.summary()
        validated = trainer.validate(module, datamodule=data, verbose=False)[0]
        tested = trainer.test(module, datamodule=data, verbose=False)[0]
    return {
        "val_loss": validated["val_loss"],
        "val_acc": validated["val_acc"],
        "test_loss": tested["test_loss"],
        "test_acc": tested["test_acc"],
        "parameters": int(counts["num_parameters"]),
        "training_flops": float(counts["training_flops"]),
        "germinated": int(counts["seeds_germinated"]),
        "fossilized": int(counts["seeds_fossilized"]),
        "culled": int(counts["seeds_culled"]),
        "recycled": int(counts["layers_recycled"]),
    }
