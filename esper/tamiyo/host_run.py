"""What the controller needs from whatever trains the host: a trainer's callback, a test, a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from esper.tamiyo.ranks import Ranks

__all__ = ["HostRun", "LossOnBatch"]


class LossOnBatch(Protocol):
    """Runs the host on one fixed batch and returns its mean loss, without side effects on logs or metrics."""

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""

    def __call__(self) -> Tensor:
        """The loss, with a graph when gradients are enabled."""


class HostRun(Protocol):
    """One training run, seen from the strategist."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train the host together."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """Every optimizer that trains the host."""

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps."""

    def held_out(self) -> Sequence[LossOnBatch]:
        """Fixed batches that the host is not trained on; empty when there are none."""

    def held_out_source(self) -> str:
        """Where the held-out batches come from, for the records."""

    def recent(self) -> LossOnBatch:
        """The batch that was trained on last, used for scoring where nothing is held out."""

    def structure_changed(self) -> None:
        """Called after seeds were added or removed, or began to take part in the loss, before the next step."""
