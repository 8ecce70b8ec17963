"""The LightningModules around the reference hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from esper.hosts.build import HostConfig, build_host, host_from_dict, host_to_dict
from esper.hosts.gpt import GPTConfig
from esper.hosts.optim import OptimConfig, build_optimizer, build_schedule

__all__ = ["ClassifierModule", "LanguageModule"]


class ClassifierModule(L.LightningModule):
    """Train a host to classify by cross-entropy.

    Logs ``train_loss`` and ``train_acc`` by step, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``
    by epoch. The network is the child ``host``. Its hyperparameters are saved as plain values, so that
    ``load_from_checkpoint`` rebuilds it from a weights-only file.

    Args:
        host: A host config, or the plain values of one (with its ``family``).
        optim: Optimizer and schedule, or the plain values of an :class:`OptimConfig`.

    Shape:
        batch: inputs (B, ...) and labels (B,); logits: (B, K).
    """

    def __init__(self, host: HostConfig | Mapping[str, Any], optim: OptimConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.host_config = host_from_dict(host) if isinstance(host, Mapping) else host
        self.optim_config = OptimConfig(**optim) if isinstance(optim, Mapping) else optim
        plain_optim = {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.optim_config).items()
        }
        self.save_hyperparameters({"host": host_to_dict(self.host_config), "optim": plain_optim})
        self.host = build_host(self.host_config)
        config = self.host_config
        num_classes = config.vocab_size if isinstance(config, GPTConfig) else config.num_classes
        # Labels come from our own readers, which have checked them; checking each batch again costs a sync.
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the host's logits."""
        return self.host(x)

    def _predict(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and labels (N,), one row a prediction."""
        x, labels = batch
        return self(x), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss; log it and the batch's accuracy."""
        logits, labels = self._predict(batch)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(dim=-1) == labels).float().mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[1]))
        self.log("train_acc", accuracy, batch_size=len(batch[1]))
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str, accuracy: MulticlassAccuracy) -> Tensor:
        logits, labels = self._predict(batch)
        loss = F.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        size = len(batch[1])
        # Every rank evaluates the whole split, so the mean over ranks is each rank's own value.
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{split}_acc", accuracy, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss; log the split's loss and accuracy."""
        return self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss; log the split's loss and accuracy."""
        return self._evaluate(batch, "test", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, unless the rate is constant, a scheduler stepped every optimizer step."""
        optimizer = build_optimizer(self, self.optim_config)
        if self.optim_config.schedule == "constant":
            return optimizer
        schedule = build_schedule(optimizer, self.optim_config, self.trainer.estimated_stepping_batches)
        assert schedule is not None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LanguageModule(ClassifierModule):
    """Train a host to predict the next token at every position; the loss is in nats a token.

    Shape:
        batch: tokens (B, T) and the tokens that follow them (B, T); logits: (B, T, V).
    """

    def _predict(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, following = batch
        return self(tokens).flatten(0, 1), following.flatten()
