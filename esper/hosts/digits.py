"""The handwritten digits that scikit-learn bundles: 1797 images of 8x8 pixels, 10 classes, no download.

Source: UCI Optical Recognition of Handwritten Digits, test part.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from esper.hosts.datamodule import HostData, Splits
from esper.hosts.splits import stratified_split

__all__ = ["DigitsData"]

_SPLIT_SEED = 20_240
_FRACTIONS = (0.6, 0.2, 0.2)


class DigitsData(HostData):
    """Digits, standardised, 60/20/20 train/val/test with equal shares of every class and a fixed cut.

    Args:
        batch_size: Training samples a step.
        eval_batch_size: Samples a step of validation and test.
        seed: Of the training order; the cut does not depend on it.
        images: Give samples as (1, 8, 8) images in place of 64 values.

    Shape:
        inputs: (B, 64) or (B, 1, 8, 8) float32; labels: (B,) int64.
    """

    def __init__(
        self, *, batch_size: int = 64, eval_batch_size: int = 512, seed: int = 0, images: bool = False
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        self.images = images

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(64,), or (1, 8, 8) for images."""
        return (1, 8, 8) if self.images else (64,)

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    def load(self) -> Splits:
        """Read, cut, and standardise each pixel by the training part's mean and deviation."""
        from sklearn.datasets import (
            load_digits,
        )  # here, because it takes longer than a small run's first epoch

        pixels, labels = load_digits(return_X_y=True)
        parts = stratified_split(labels, _FRACTIONS, seed=_SPLIT_SEED)
        mean = pixels[parts[0]].mean(axis=0)
        std = pixels[parts[0]].std(axis=0)
        # A border pixel that is (nearly) always blank says nothing, and dividing by its tiny deviation would
        # turn one stray grey value of another split into a huge input.
        std = np.where(std < 0.1, np.inf, std)
        scaled = (pixels - mean) / std
        train, val, test = (
            TensorDataset(
                torch.from_numpy(scaled[part]).float().reshape(-1, *self.input_shape),
                torch.from_numpy(labels[part]).long(),
            )
            for part in parts
        )
        return Splits(train, val, test)
