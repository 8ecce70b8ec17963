"""Hosts of any depth, narrow so that what grows with the number of layers is what is seen.

Their initialisation lets a gradient through ten thousand layers: a plain layer starts near the identity, a
residual branch is scaled by the root of the depth.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.hosts import GPT, GPTConfig

__all__ = ["BATCH_SIZE", "KINDS", "ScaleModule", "make_batches"]

KINDS = ("mlp", "residual", "gpt")
WIDTH, CLASSES, BATCH_SIZE = 16, 10, 32
_VOCABULARY, _CONTEXT = 64, 16


class DeepMLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them, one after the other."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers - 1))
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)
            with torch.no_grad():
                layer.weight.add_(torch.randn(WIDTH, WIDTH) / math.sqrt(num_layers * WIDTH))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of x [B, width]."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class ResidualMLP(nn.Module):
    """An input layer, residual blocks of two layers each, and a head: ``num_layers`` in all, or one less."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        depth = max(1, (num_layers - 2) // 2)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.scale = 1.0 / math.sqrt(depth)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of x [B, width]."""
        h = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = h + self.scale * down(up(h).relu())
        return self.head(h)


class ScaleModule(L.LightningModule):
    """One of the hosts with its loss and AdamW.

    Args:
        kind: Of :data:`KINDS`.
        num_layers: Dense layers; a GPT has four a block, and its head.
    """

    def __init__(self, kind: str, num_layers: int) -> None:
        super().__init__()
        self.host: nn.Module
        if kind == "gpt":
            depth = max(1, (num_layers - 1) // 4)
            self.host = GPT(
                GPTConfig(vocab_size=_VOCABULARY, context=_CONTEXT, d_model=WIDTH, depth=depth, num_heads=2)
            )
        else:
            self.host = DeepMLP(num_layers) if kind == "mlp" else ResidualMLP(num_layers)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean loss."""
        x, y = batch
        return self.loss(self.host(x), y)

    @staticmethod
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, *, classes] against y [B, *]."""
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean loss."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a rate that keeps any of the hosts finite."""
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


def make_batches(kind: str, count: int) -> list[Any]:
    """``count`` batches of random inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    if kind == "gpt":
        shape = (BATCH_SIZE // 8, _CONTEXT + 1)
        tokens = [torch.randint(_VOCABULARY, shape, generator=generator) for _ in range(count)]
        return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    return [
        (
            torch.randn(BATCH_SIZE, WIDTH, generator=generator),
            torch.randint(CLASSES, (BATCH_SIZE,), generator=generator),
        )
        for _ in range(count)
    ]
