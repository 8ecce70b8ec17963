"""Fashion-MNIST (Xiao et al. 2017): 28x28 grey images of ten kinds of clothing, read from its IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from esper.errors import ConfigError, DataFormatError
from esper.hosts.datamodule import HostData, Splits
from esper.hosts.files import find_data_file
from esper.hosts.splits import stratified_split

__all__ = ["FashionData", "fit_pca", "read_idx"]

_SPLIT_SEED = 20_240
_NUM_VAL = 5_000
_SIDE = 28
_ORIGIN = "https://github.com/zalandoresearch/fashion-mnist (data/fashion)"

InputForm = Literal["pca", "pixels", "images"]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes.

    The format: two zero bytes, the type (8 for uint8), the number of dimensions, each size as a big-endian
    32-bit integer, then the values, last dimension fastest.

    Raises:
        DataFormatError: If the file is not gzip, not such a file, or shorter or longer than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataFormatError(
            f"expected a gzip file at {path}, but it does not unpack ({error}); fetch it again"
        ) from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataFormatError(
            f"expected an IDX file of bytes (beginning 00 00 08) at {path}, "
            f"got {data[:4].hex(' ') or 'nothing'}"
        )
    num_dims = data[3]
    header = 4 + 4 * num_dims
    if num_dims == 0 or len(data) < header:
        raise DataFormatError(
            f"the IDX header of {path} announces {num_dims} dimensions in {len(data)} bytes"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=num_dims, offset=4))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise DataFormatError(
            f"the IDX header of {path} announces {shape}, that is {expected} values, "
            f"but {len(data) - header} follow"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def fit_pca(x: NDArray[np.float32], num_components: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean (F,) and the leading principal directions (F, num_components) of ``x`` (n, F).

    Directions are eigenvectors of the covariance in float64, the largest variance first; each one's sign
    makes its largest entry positive, so that a repeat on another machine gives the same inputs.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    second = (x.T @ x).astype(np.float64) / len(x)
    _, vectors = np.linalg.eigh(second - np.outer(mean, mean))
    leading = vectors[:, ::-1][:, :num_components]
    largest = np.abs(leading).argmax(axis=0)
    return mean, leading * np.sign(leading[largest, np.arange(num_components)])


class FashionData(HostData):
    """Fashion-MNIST; 5000 of the 60000 training images (500 a class, a fixed cut) are the validation split.

    Args:
        batch_size: Training samples a step.
        eval_batch_size: Samples a step of validation and test.
        seed: Of the training order; the cut does not depend on it.
        inputs: "pca" for the leading principal components (fitted on the training part, one common scale),
            "pixels" for 784 values, "images" for (1, 28, 28).
        num_components: Of "pca".
        limit_train: Keep only this many training samples; None for all 55000.

    Shape:
        inputs: (B, num_components), (B, 784) or (B, 1, 28, 28) float32; labels: (B,) int64.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        seed: int = 0,
        inputs: InputForm = "pca",
        num_components: int = 64,
        limit_train: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        if inputs not in get_args(InputForm):
            raise ConfigError(f"FashionData.inputs must be one of {get_args(InputForm)}, got {inputs!r}")
        if not 1 <= num_components <= _SIDE**2:
            raise ConfigError(f"FashionData.num_components must lie in [1, {_SIDE**2}], got {num_components}")
        if limit_train is not None and limit_train < 1:
            raise ConfigError(f"FashionData.limit_train must be at least 1 or None, got {limit_train}")
        self.inputs = inputs
        self.num_components = num_components
        self.limit_train = limit_train

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Depends on ``inputs``."""
        if self.inputs == "pca":
            return (self.num_components,)
        return (1, _SIDE, _SIDE) if self.inputs == "images" else (_SIDE**2,)

    @property
    def num_classes(self) -> int:
        """Ten kinds of clothing."""
        return 10

    def _read(self, part: Literal["train", "t10k"]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return pixels (n, 784) from 0 to 1 and labels (n,) of one pair of files."""
        paths = [
            find_data_file(f"fashion-mnist/{part}-{kind}-ubyte.gz", origin=_ORIGIN)
            for kind in ("images-idx3", "labels-idx1")
        ]
        images, labels = (read_idx(path) for path in paths)
        if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE) or labels.shape != images.shape[:1]:
            raise DataFormatError(
                f"expected images (n, {_SIDE}, {_SIDE}) and labels (n,) in {paths[0]} and {paths[1]}, "
                f"got {images.shape} and {labels.shape}"
            )
        if labels.max(initial=0) >= self.num_classes:
            raise DataFormatError(
                f"expected labels 0 to {self.num_classes - 1} in {paths[1]}, got {labels.max()}"
            )
        return images.reshape(len(images), -1).astype(np.float32) / 255.0, labels.astype(np.int64)

    def load(self) -> Splits:
        """Read, carve the validation split out of the training files, and transform the inputs."""
        pixels, labels = self._read("train")
        test_pixels, test_labels = self._read("t10k")
        if len(labels) <= _NUM_VAL:
            raise DataFormatError(f"expected more than {_NUM_VAL} training images, got {len(labels)}")
        share = _NUM_VAL / len(labels)
        train_part, val_part = stratified_split(labels, (1.0 - share, share), seed=_SPLIT_SEED)
        train_part = train_part[: self.limit_train]
        train = pixels[train_part]
        forms = self._transform(train, train, pixels[val_part], test_pixels)
        targets = (labels[train_part], labels[val_part], test_labels)
        return Splits(
            *(
                TensorDataset(form.reshape(-1, *self.input_shape), torch.from_numpy(target))
                for form, target in zip(forms, targets, strict=True)
            )
        )

    def _transform(self, reference: NDArray[np.float32], *parts: NDArray[np.float32]) -> list[torch.Tensor]:
        """Standardise ``parts`` by figures of ``reference`` alone."""
        if self.inputs != "pca":
            mean, std = float(reference.mean()), float(reference.std())
            return [torch.from_numpy((part - mean) / std) for part in parts]
        mean_pixels, directions = fit_pca(reference, self.num_components)
        projected = [(part - mean_pixels) @ directions for part in parts]
        # One scale for all: whitening would blow up the last components, which are mostly noise.
        scale = projected[0].std()
        return [torch.from_numpy((part / scale).astype(np.float32)) for part in projected]
