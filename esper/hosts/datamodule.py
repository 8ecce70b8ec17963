"""What every reference data set offers: three splits in memory and a resumable training order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import SequentialSampler

from esper.errors import ConfigError
from esper.hosts.loader import BatchLoader, EpochSampler, IndexedDataset

__all__ = ["HostData", "Splits"]


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of a data set.

    ``train`` fits weights; ``val`` feeds curves, gates and rewards; ``test`` is read once, at the end.
    """

    train: IndexedDataset
    val: IndexedDataset
    test: IndexedDataset


class HostData(L.LightningDataModule, ABC):
    """Base of the reference data sets.

    The training order depends on (``seed``, epoch) alone. A checkpoint keeps the place in it, and
    ``fit(ckpt_path=...)`` continues with the very next batch, also in the middle of an epoch.

    Under several processes each trains on its share, and each evaluates the whole of a split, which is small:
    figures stay exact, without the duplicates that padding would bring in.

    Args:
        batch_size: Training samples a step, on each process.
        eval_batch_size: Samples a step of validation and test.
        seed: Of the training order.
    """

    def __init__(self, *, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ConfigError(
                f"batch_size and eval_batch_size must be at least 1, got {batch_size} and {eval_batch_size}"
            )
        if seed < 0:
            raise ConfigError(f"seed must be at least 0, got {seed}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._splits: Splits | None = None
        self._train_loader: BatchLoader | None = None
        self._restored: dict[str, int] | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Read the data and cut it; called once."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample's input, without the batch."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Classes to tell apart; for text the vocabulary's size."""

    @property
    def splits(self) -> Splits:
        """The three splits, read on first use."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    def setup(self, stage: str) -> None:
        """Read the data, unless that was done (Lightning's hook)."""
        _ = self.splits

    def train_sampler(self, train: IndexedDataset) -> EpochSampler:
        """Return the order of the training samples."""
        return EpochSampler(len(train), seed=self.seed)

    def train_dataloader(self) -> BatchLoader:
        """Return a fresh training loader, at the place that a checkpoint restored, if one was."""
        train, trainer = self.splits.train, self.trainer
        # Overfitting a few batches means the same few every epoch.
        shuffle = not getattr(trainer, "overfit_batches", 0)
        loader = BatchLoader(
            train,
            self.batch_size,
            sampler=self.train_sampler(train) if shuffle else SequentialSampler(range(len(train))),
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
        )
        if self._restored is not None:
            loader.load_state_dict(self._restored)
            self._restored = None
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> BatchLoader:
        """Return the validation batches, in order."""
        return self._eval_loader(self.splits.val)

    def test_dataloader(self) -> BatchLoader:
        """Return the test batches, in order."""
        return self._eval_loader(self.splits.test)

    def _eval_loader(self, data: IndexedDataset) -> BatchLoader:
        return BatchLoader(data, self.eval_batch_size, sampler=SequentialSampler(range(len(data))))

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training data, for a checkpoint."""
        # Lightning keeps a loader's own state too, but restores it only if nothing asked for the loader
        # before the loops were restored; a schedule that asks for the number of steps does (lightning
        # 2.6.6, FitLoop.setup_data returns early). A data module is restored before either.
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note the place to continue from; the next training loader starts there."""
        # Testing a checkpoint restores its data module as well; that must not shorten a later run's epoch.
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._restored = state_dict.get("train_loader")
