"""Three small hosts with random data, for measuring what a step costs and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.hosts import CNNConfig, GPTConfig, HostConfig, MLPConfig, build_host

__all__ = ["HOSTS", "Batches", "TimedModule", "loaders", "make_batch"]

HOSTS: dict[str, tuple[HostConfig, int]] = {
    "mlp": (MLPConfig(in_features=128, hidden=(128,) * 5), 64),
    "cnn": (CNNConfig(in_channels=1, widths=(8, 16, 16), strides=(2, 1, 2)), 64),
    "gpt": (GPTConfig(d_model=64, depth=2, context=64), 8),
    "wide": (MLPConfig(in_features=128, hidden=(768,) * 5), 64),
}
"""Host -> its config and its batch size: a six-layer MLP of 84 thousand parameters, three convolutions on
28 x 28, two blocks, and an MLP of 2.5 million parameters to compare watching with."""

_NUM_DISTINCT = 8
_NUM_HELD_OUT = 4


class TimedModule(L.LightningModule):
    """The host with its loss and AdamW, and nothing that would hide a callback's cost: no log, no metric."""

    def __init__(self, host: HostConfig) -> None:
        super().__init__()
        self.host: nn.Module = build_host(host)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss."""
        x, y = batch
        logits = self.host(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the batch's mean loss."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a rate that keeps the loss finite for any number of steps."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Batches:
    """A loader that hands out a few fixed batches over and over.

    Args:
        batches: What to hand out.
        length: Batches an epoch.
    """

    def __init__(self, batches: list[tuple[Tensor, Tensor]], length: int) -> None:
        self._batches, self._length = batches, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._batches[index % len(self._batches)] for index in range(self._length))


def make_batch(host: HostConfig, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets that fit ``host``."""
    if isinstance(host, GPTConfig):
        tokens = torch.randint(host.vocab_size, (batch_size, host.context + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    assert isinstance(host, (MLPConfig, CNNConfig)), "no other host is timed here"
    shape = (host.in_features,) if isinstance(host, MLPConfig) else (host.in_channels, 28, 28)
    x = torch.randn((batch_size, *shape), generator=generator)
    return x, torch.randint(host.num_classes, (batch_size,), generator=generator)


def loaders(host: HostConfig, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Return training and validation loaders, as arguments of ``trainer.fit``."""
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(host, batch_size, generator) for _ in range(_NUM_DISTINCT + _NUM_HELD_OUT)]
    return {
        "train_dataloaders": Batches(batches[:_NUM_DISTINCT], num_steps),
        "val_dataloaders": Batches(batches[_NUM_DISTINCT:], _NUM_HELD_OUT),
    }
