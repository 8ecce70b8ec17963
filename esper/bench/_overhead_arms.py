"""The runs that ``esper bench overhead`` compares: one host, trained plainly, watched, or ready to grow."""

from __future__ import annotations

import ctypes
import logging
import platform
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from esper.bench._hosts_to_time import HOSTS, TimedModule, loaders
from esper.bench._turns import Fit, Turn
from esper.callbacks import TamiyoCallback

__all__ = ["ARMS", "HORIZON_STEPS", "EmptyCallback", "make_fit", "memory_mb", "quiet"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h

HORIZON_STEPS = 10_000
"""Length that each run announces: decision points lie 2 % of it apart, 200 steps, as sampled steps do."""


class EmptyCallback(L.Callback):
    """Overrides the hooks that :class:`TamiyoCallback` uses and does nothing: what Lightning itself charges."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Nothing."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Nothing."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing."""


ARMS: dict[str, Callable[[], list[L.Callback]]] = {
    "without": lambda: [],
    "again": lambda: [],
    "empty": lambda: [EmptyCallback()],
    "attached": lambda: [TamiyoCallback(policy_options={"num_events": 0})],
    "watching": lambda: [TamiyoCallback(policy="off")],
    "probes_off": lambda: [TamiyoCallback(policy="off", probes={"interval_steps": 0})],
}
"""Arm -> its callbacks. ``attached`` is the default callback with all it does but germinate."""


def quiet() -> None:
    """Keep Lightning's advice out of the output, and threads from being served memory unequally."""
    torch.set_num_threads(1)
    _one_heap()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")


def _one_heap() -> None:
    """Let all threads share one heap that is never given back.

    glibc gives each thread a heap of its own, and a block that is unmapped and mapped again at every step is
    paid for in page faults; whether that happens to a run depends on which thread it was given. Two equal arms
    on the CNN were 45 % apart.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 1 << 30)):
        libc.mallopt(parameter, value)


def make_fit(
    host: str, callbacks: Callable[[], list[L.Callback]], *, logger: Any = False, watch: Any = None
) -> Fit:
    """Return what trains ``host`` under a :class:`~esper.bench._turns.Turn`.

    Args:
        host: Of :data:`HOSTS`.
        callbacks: Makes the arm's callbacks.
        logger: Lightning's.
        watch: Called with the module before training, if given.
    """

    def fit(turn: Turn) -> None:
        _train(host, [turn, *callbacks()], num_steps=HORIZON_STEPS, logger=logger, watch=watch)

    return fit


def _train(host: str, callbacks: list[L.Callback], *, num_steps: int, logger: Any, watch: Any) -> None:
    config, batch_size = HOSTS[host]
    torch.manual_seed(0)
    module = TimedModule(config)
    if watch is not None:
        watch(module)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=logger,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, **loaders(config, batch_size, num_steps))


def memory_mb(task: tuple[str, str, int]) -> tuple[float, float]:
    """Train ``(host, arm, steps)`` in this process, fresh as it should be, and return what memory it holds then.

    Returns:
        Megabytes that the process has allocated, its heap and tensors; and those of files that it has mapped,
        which are pages of libraries that were run at least once: shared by all processes that run them, and
        dropped when memory is short. The heap is never given back here (:func:`quiet`), so that what
        is held at the end is the peak. Where a system does not tell the two apart, the second is 0.
    """
    host, arm, num_steps = task
    _train(host, ARMS[arm](), num_steps=num_steps, logger=False, watch=None)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss is no use on Linux: a child starts with its parent's peak
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) / 1e3, int(lines["RssFile"].split()[0]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3), 0.0


def wandb_fits(host: str, folder: Path, interval_steps: int) -> tuple[dict[str, Fit], Callable[[], None]]:
    """Return three runs that log to one offline W&B run, and what ends it.

    ``logger`` logs nothing, ``wandb`` is watched by ``watch(log="all")``, ``esper`` by the callback.

    Raises:
        ModuleNotFoundError: W&B is not installed.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        project="esper-bench", save_dir=folder, offline=True, settings=wandb.Settings(silent=True)
    )
    _ = logger.experiment  # started here, in the main thread

    def watch(module: L.LightningModule) -> None:
        logger.watch(module, log="all", log_freq=interval_steps, log_graph=False)

    def watching() -> list[L.Callback]:
        return [TamiyoCallback(policy="off", probes={"interval_steps": interval_steps})]

    fits = {
        "logger": make_fit(host, list, logger=logger),
        "wandb": make_fit(host, list, logger=logger, watch=watch),
        "esper": make_fit(host, watching, logger=logger),
    }
    return fits, wandb.finish
