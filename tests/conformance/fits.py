"""A module that fits any network to fixed data, and fits of it in which seeds grow; for the tables of layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import QUICK, growing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from esper.callbacks import TamiyoCallback

F_IN, K, B = 8, 3, 6
"""Features, classes and samples a batch."""
NUM_BATCHES = 8


class Classifies(L.LightningModule):
    """Trains ``net`` by cross-entropy; logs nothing, because dynamo cannot trace Lightning's ``log``."""

    def __init__(self, net: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them: ``0``, ``2``, ``4``, ..."""
    torch.manual_seed(seed)
    sizes = (F_IN, *widths, K)
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loader(shape: Sequence[int] = (F_IN,), make: Callable[[Tensor], Tensor] | None = None) -> DataLoader[Any]:
    """The same batches in the same order in every epoch."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(B * NUM_BATCHES, *shape, generator=generator)
    y = torch.randint(0, K, (len(x),), generator=generator)
    return DataLoader(TensorDataset(x if make is None else make(x), y), batch_size=B)


def fit(
    module: Any,
    folder: Path,
    *entries: tuple[Any, ...],
    epochs: int = 2,
    callbacks: Sequence[L.Callback] = (),
    data: DataLoader[Any] | None = None,
    ckpt_path: Path | None = None,
    grow: TamiyoCallback | None = None,
    trainer: dict[str, Any] | None = None,
    lifecycle: dict[str, Any] | None = None,
    **settings: Any,
) -> TamiyoCallback:
    """Fit ``module`` while seeds grow by ``entries`` (fraction of the run, site, blueprint, size); every epoch
    leaves a checkpoint ``epoch=N.ckpt`` in ``folder``.
    """
    data = data or loader()
    grow = grow or growing(
        folder, *entries, lifecycle=QUICK | (lifecycle or {}), probes={"interval_steps": 5}, **settings
    )
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # what Lightning has to say about tiny runs
        warnings.filterwarnings("ignore", "Checkpoint directory")
        warnings.filterwarnings(
            "ignore", "TypedStorage is deprecated"
        )  # torch's own copies of quantised tensors
        runner = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[grow, *callbacks, saver],
            **(trainer or {}),
        )
        torch.manual_seed(1)
        runner.fit(module, data, data, ckpt_path=ckpt_path)
    return grow
