"""What hosts are trained on: every task's samples in memory, cut in three once and for all.

``train`` is trained on; ``held_out`` is what gates, scores, decisions and rewards may look at; ``test`` is
read once, for the final figure. Cuts do not depend on a run's seed, so no host sees another's test part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.environment.corpora import VOCABULARY, corpus_tokens
from esper.tamiyo.environment.specs import (
    DigitsTask,
    FashionTask,
    PictureTask,
    ShakespeareTask,
    Task,
    TeacherTask,
    TextTask,
    derived_seed,
)

__all__ = ["NOISE_VARIANCE", "Samples", "TaskData", "load_task"]

NOISE_VARIANCE = 0.01
"""σ₀² of regression: the resolution at which targets of unit variance are told apart."""

_CUT_SEED = 20_240
_FRACTIONS = (0.6, 0.2, 0.2)
_TEACHER_HELD_OUT = 1024
_FASHION_HELD_OUT, _FASHION_TEST = 1000, 4000
_TEXT_WINDOWS = 256


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of one part.

    A text is kept as windows [n, context + 1], whose inputs and targets overlap.

    Shape:
        x: (n, F), (n, C, H, W), or windows (n, T + 1); y: (n,) classes, (n, O) targets; None for windows.
    """

    x: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def pick(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples."""
        x = self.x[index]
        return (x[:, :-1], x[:, 1:]) if self.y is None else (x, self.y[index])


@dataclass(frozen=True)
class TaskData:
    """All of a task's samples.

    Attributes:
        train: Trained on.
        held_out: For gates, scores, decisions and rewards.
        test: For the final figure alone.
        input_shape: Of one sample: (F,), (C, H, W) or (T,).
        num_outputs: Classes, vocabulary, or regression targets.
        classes: Targets are classes; else real numbers of unit variance.
        positions: Predictions a sample.
    """

    train: Samples
    held_out: Samples
    test: Samples
    input_shape: tuple[int, ...]
    num_outputs: int
    classes: bool
    positions: int = 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats.

        Cross-entropy of classes. For real targets ½·log(1 + MSE/σ₀²) of the batch: the capacity of a Gaussian
        channel, that is the nats a target costs that must be told to a variance of σ₀². It is positive, lies in
        the range of cross-entropies, and prices an error alike in all families, as a utility in nats needs.

        Shape:
            outputs: (B, K) or (B, T, K); targets: (B,), (B, T), or (B, K) real. Output: ().
        """
        if self.classes:
            return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        return 0.5 * torch.log1p(F.mse_loss(outputs, targets) / NOISE_VARIANCE)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of right predictions; of real targets, the share of their variance that is explained."""
        if self.classes:
            return (outputs.argmax(-1) == targets).float().mean()
        return 1.0 - F.mse_loss(outputs, targets)


@lru_cache(maxsize=16)
def load_task(task: Task) -> TaskData:
    """Read or make the samples of ``task``; the last few stay in memory.

    Raises:
        DataNotFoundError: A sealed task's files are not below ``ESPER_DATA_DIR``.
        ConfigError: The task asks for more than its source has.
    """
    if isinstance(task, DigitsTask):
        return _digits(task)
    if isinstance(task, TeacherTask):
        return _teacher(task)
    if isinstance(task, PictureTask):
        return _picture(task)
    if isinstance(task, TextTask):
        return _text(task)
    if isinstance(task, FashionTask):
        return _fashion(task)
    return _shakespeare(task)


@lru_cache(maxsize=1)
def _digit_parts() -> tuple[tuple[Tensor, Tensor], ...]:
    from sklearn.datasets import load_digits  # here, because it takes as long as a small run

    from esper.hosts.splits import stratified_split

    pixels, labels = load_digits(return_X_y=True)
    parts = stratified_split(labels, _FRACTIONS, seed=_CUT_SEED)
    mean, std = pixels[parts[0]].mean(axis=0), pixels[parts[0]].std(axis=0)
    scaled = (pixels - mean) / np.where(std < 0.1, np.inf, std)  # a blank border pixel says nothing
    return tuple((torch.from_numpy(scaled[p]).float(), torch.from_numpy(labels[p]).long()) for p in parts)


def _digits(task: DigitsTask) -> TaskData:
    shape = (1, 8, 8) if task.images else (64,)
    train, held_out, test = (Samples(x.reshape(-1, *shape), y) for x, y in _digit_parts())
    train = _first(train, task.num_train, task)
    return TaskData(train, held_out, test, shape, 10, classes=True)


def _teacher(task: TeacherTask) -> TaskData:
    draw = torch.Generator().manual_seed(derived_seed("teacher", task.seed))
    x = torch.randn(task.num_train + 2 * _TEACHER_HELD_OUT, task.in_features, generator=draw)
    y = x
    for d_in, d_out in pairwise((task.in_features, *task.hidden)):
        # gain 2: with 1 the units of a tanh network hardly leave their linear range
        y = torch.tanh(y @ (torch.randn(d_in, d_out, generator=draw) * (2.0 / math.sqrt(d_in))))
    y = y @ torch.randn(y.shape[1], task.out_features, generator=draw)
    y = (y - y.mean(0)) / y.std(0)
    y = y + math.sqrt(NOISE_VARIANCE) * torch.randn(y.shape, generator=draw)
    parts = [task.num_train, _TEACHER_HELD_OUT, _TEACHER_HELD_OUT]
    train, held_out, test = map(Samples, x.split(parts), y.split(parts))
    return TaskData(train, held_out, test, (task.in_features,), task.out_features, classes=False)


@lru_cache(maxsize=2)
def _picture_pixels(name: str) -> NDArray[np.uint8]:
    from sklearn.datasets import load_sample_image

    return np.asarray(load_sample_image(f"{name}.jpg"))


def _picture(task: PictureTask) -> TaskData:
    pixels = _picture_pixels(task.picture)
    bottom, right = task.top + task.side, task.left + task.side
    if bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise ConfigError(
            f"a crop of {task.picture}.jpg must lie within {pixels.shape[:2]}, got rows to {bottom} and "
            f"columns to {right}; choose a smaller side or another corner"
        )
    crop = torch.from_numpy(pixels[task.top : bottom, task.left : right].astype(np.float32)).reshape(-1, 3)
    if float(crop.std(0).min()) == 0.0:
        raise ConfigError(f"the crop {task} has one colour only, so there is nothing to learn from it")
    colours = (crop - crop.mean(0)) / crop.std(0)
    axis = torch.linspace(-1.0, 1.0, task.side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    octaves = [torch.pi * 2.0**k * grid for k in range(task.num_octaves)]
    x = torch.cat([grid, *(wave(angle) for angle in octaves for wave in (torch.sin, torch.cos))], dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_CUT_SEED))
    sizes = [int(share * len(x)) for share in _FRACTIONS[1:]]
    parts = order.split([len(x) - sum(sizes), *sizes])
    train, held_out, test = (Samples(x[part], colours[part]) for part in parts)
    return TaskData(train, held_out, test, (x.shape[1],), 3, classes=False)


def _text(task: TextTask) -> TaskData:
    tokens = corpus_tokens(task.corpus)
    cuts = [int(0.8 * len(tokens)), int(0.9 * len(tokens))]
    parts = tokens.tensor_split(cuts)
    train = Samples(parts[0].unfold(0, task.context + 1, 1), None)
    held_out, test = (_tiles(part, task.context) for part in parts[1:])
    return TaskData(train, held_out, test, (task.context,), len(VOCABULARY) + 1, True, task.context)


def _tiles(tokens: Tensor, context: int) -> Samples:
    """Windows without overlap, evenly over the part, at most ``_TEXT_WINDOWS``."""
    windows = tokens.unfold(0, context + 1, context)
    return Samples(windows[:: max(1, len(windows) // _TEXT_WINDOWS)][:_TEXT_WINDOWS].clone(), None)


def _fashion(task: FashionTask) -> TaskData:
    train, held_out, test = _fashion_parts(task.images)
    shape = tuple(train.x.shape[1:])
    return TaskData(_first(train, task.num_train, task), held_out, test, shape, 10, classes=True)


@lru_cache(maxsize=2)
def _fashion_parts(images: bool) -> tuple[Samples, Samples, Samples]:
    from esper.hosts.fashion import FashionData

    splits = FashionData(inputs="images" if images else "pca").splits
    sizes = (None, _FASHION_HELD_OUT, _FASHION_TEST)
    parts = []
    for part, size in zip((splits.train, splits.val, splits.test), sizes, strict=True):
        x, y = part[:size]
        # 28 × 28 pixels cost four times as much, and a run has to stay short
        parts.append(Samples(F.avg_pool2d(x, 2) if images else x, y))
    return parts[0], parts[1], parts[2]


def _shakespeare(task: ShakespeareTask) -> TaskData:
    from esper.hosts.shakespeare import ShakespeareData, WindowDataset

    data = ShakespeareData(context=task.context)
    splits = data.splits
    parts = []
    for part in (splits.train, splits.val, splits.test):
        assert isinstance(part, WindowDataset)
        parts.append(part.windows)
    train = Samples(parts[0], None)
    held_out, test = (Samples(w[:: max(1, len(w) // _TEXT_WINDOWS)][:_TEXT_WINDOWS], None) for w in parts[1:])
    return TaskData(train, held_out, test, (task.context,), data.num_classes, True, task.context)


def _first(samples: Samples, count: int, task: Task) -> Samples:
    if count > len(samples):
        raise ConfigError(f"{task} asks for {count} training samples, but there are {len(samples)}")
    assert samples.y is not None
    if len(samples) == 0:
        raise DataFormatError(f"{task} has no training samples")
    return Samples(samples.x[:count], samples.y[:count])
