"""Batches in a deterministic order that can be taken up again in the middle of an epoch.

The order of an epoch is a pure function of (seed, epoch): it does not depend on torch's global generator,
on how many epochs ran before, or on who else draws random numbers, and drawing it disturbs nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

from esper.errors import CheckpointError, ConfigError

__all__ = ["BatchLoader", "EpochSampler", "IndexedDataset"]


class IndexedDataset(Protocol):
    """Data that a tensor of indices selects from in one go, such as torch's ``TensorDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]: ...


class EpochSampler(Sampler[int]):
    """Indices in an order that depends on the seed and the epoch alone.

    Lightning calls :meth:`set_epoch` before every training epoch.

    Args:
        num_items: Indices run from 0 to ``num_items - 1``.
        seed: Of the order.
        num_samples: Indices an epoch; None for all items.
        replacement: Draw independently, so that items may repeat; otherwise a permutation.

    Raises:
        ConfigError: If more samples than items are wanted without replacement.
    """

    def __init__(
        self, num_items: int, *, seed: int, num_samples: int | None = None, replacement: bool = False
    ) -> None:
        self.num_items = num_items
        self.seed = seed
        self.num_samples = num_items if num_samples is None else num_samples
        self.replacement = replacement
        self.epoch = 0
        if num_items < 1 or self.num_samples < 1:
            raise ConfigError(
                f"a sampler needs at least one item, got {num_items} items, {self.num_samples} samples"
            )
        if not replacement and self.num_samples > num_items:
            raise ConfigError(
                f"an epoch without replacement has at most {num_items} samples, got num_samples={num_samples}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def indices(self) -> Tensor:
        """Return this epoch's indices, (num_samples,) int64 on the CPU."""
        # SeedSequence mixes both numbers, so that (seed 0, epoch 1) and (seed 1, epoch 0) differ.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed) >> 1)
        if self.replacement:
            return torch.randint(self.num_items, (self.num_samples,), generator=generator)
        return torch.randperm(self.num_items, generator=generator)[: self.num_samples]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def __len__(self) -> int:
        return self.num_samples


class BatchLoader:
    """Iterate over batches of an in-memory data set, each fetched by one indexing operation.

    It stands in for a ``DataLoader``, which would collate sample by sample, and it keeps its place:
    :meth:`state_dict` after k batches of epoch e makes a loader of equal settings start epoch e at batch k,
    and every other epoch at its beginning. Lightning's ``fit(ckpt_path=...)`` then sees exactly the batches
    that were left.

    The place belongs to the loader, so only one iteration at a time may run over it; for a look at the data
    by the side, iterate over a ``copy.copy`` of it or index its ``dataset``. A checkpoint that is written
    while a batch is being processed (after an exception, say) counts that batch as seen.

    Args:
        dataset: What to fetch from.
        batch_size: Samples a batch, on each replica.
        sampler: The order; torch's ``SequentialSampler`` for data that is not to be shuffled.
        drop_last: Leave out a last batch that is not full.
        num_replicas: Processes that share each epoch; each takes every ``num_replicas``-th index, and the
            first indices are repeated where the number does not divide (as DistributedSampler does).
        rank: Which of them this is.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        batch_size: int,
        *,
        sampler: EpochSampler | SequentialSampler,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < num_replicas:
            raise ConfigError(
                f"rank must lie in [0, num_replicas), got rank={rank}, num_replicas={num_replicas}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler = sampler
        self.batch_sampler = None  # Lightning asks every loader with a sampler for it
        self.drop_last = drop_last
        self.num_replicas = num_replicas
        self.rank = rank
        self._epoch = 0
        self._position = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch, also after a resume in its middle."""
        share = -(-len(self.sampler) // self.num_replicas)
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def _order(self) -> Tensor:
        if isinstance(self.sampler, EpochSampler):
            order = self.sampler.indices()
        else:
            order = torch.arange(len(self.sampler))
        if self.num_replicas == 1:
            return order
        missing = -len(order) % self.num_replicas
        return torch.cat([order, order[:missing]])[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator, so nothing here runs before the first batch is asked for: Lightning makes the first
        # iterator before it tells the sampler its epoch.
        epoch = self.sampler.epoch if isinstance(self.sampler, EpochSampler) else 0
        start = 0
        if self._resume is not None:
            resumed_epoch, position = self._resume
            # A place at the end of its epoch, or in another epoch, means that a fresh epoch begins.
            start = position if resumed_epoch == epoch and position < len(self) else 0
            self._resume = None
        order = self._order()
        for batch in range(start, len(self)):
            self._epoch, self._position = epoch, batch + 1
            yield self.dataset[order[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def _settings(self) -> dict[str, int]:
        """What has to be equal for a place in an epoch to mean the same batches."""
        shuffled = self.sampler if isinstance(self.sampler, EpochSampler) else None
        return {
            "seed": shuffled.seed if shuffled else -1,
            "num_items": len(self.dataset),
            "num_samples": len(self.sampler),
            "batch_size": self.batch_size,
            "num_replicas": self.num_replicas,
        }

    def state_dict(self) -> dict[str, int]:
        """Return the place in the data, and the settings it holds for, as plain integers."""
        epoch, position = self._resume if self._resume is not None else (self._epoch, self._position)
        return {"epoch": epoch, "position": position, "num_batches": len(self), **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the place that :meth:`state_dict` returned.

        Raises:
            CheckpointError: If the place lies inside an epoch that this loader would cut differently.
        """
        inside = 0 < state["position"] < state["num_batches"]
        settings = self._settings()
        differing = {k: (state.get(k), v) for k, v in settings.items() if state.get(k) != v}
        if inside and differing:
            listed = ", ".join(f"{k}: {old} then, {new} now" for k, (old, new) in differing.items())
            raise CheckpointError(
                f"the checkpoint was written after batch {state['position']} of {state['num_batches']} of "
                f"epoch {state['epoch']}, but the training data is set up differently ({listed}); use the "
                "same data settings, or resume from a checkpoint written at the end of an epoch"
            )
        self._resume = (state["epoch"], state["position"]) if inside else None
