"""The data sets: disjoint splits, scaling fitted on the training part, readers that check, clear errors."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from esper.errors import ConfigError, DataFormatError, DataNotFoundError
from esper.hosts import DigitsData, FashionData, ShakespeareData
from esper.hosts.fashion import fit_pca, read_idx
from esper.hosts.shakespeare import UNKNOWN, WindowDataset, decode, encode
from esper.hosts.splits import stratified_split

needs_data = pytest.mark.skipif(
    not os.environ.get("ESPER_DATA_DIR"),
    reason="reads Fashion-MNIST and tiny Shakespeare from ESPER_DATA_DIR",
)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1, mtime=0)


@pytest.fixture
def small_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 5200 + 50 random images in Fashion-MNIST's files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for part, count in (("train", 5200), ("t10k", 50)):
        images = rng.integers(0, 256, (count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.arange(count) % 10))
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    return folder


def write_text(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text(text, encoding="utf-8")
    monkeypatch.setenv("ESPER_DATA_DIR", str(folder))


def rows(*tensors: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in torch.cat(tensors).flatten(1)]


def test_stratified_parts_are_disjoint_complete_and_balanced() -> None:
    labels = np.repeat(np.arange(3), (100, 51, 7))
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=1)
    assert sorted(np.concatenate(parts)) == list(range(158))
    assert np.bincount(labels[parts[0]]).tolist() == [60, 31, 4]
    assert [p.tolist() for p in stratified_split(labels, (0.6, 0.2, 0.2), seed=1)] == [
        p.tolist() for p in parts
    ]
    with pytest.raises(ConfigError, match="add up to 1"):
        stratified_split(labels, (0.6, 0.6), seed=1)


def test_digits_are_three_disjoint_standardised_splits() -> None:
    splits = DigitsData(seed=3).splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1078, 360, 359]
    images = [part[:][0] for part in (splits.train, splits.val, splits.test)]
    assert len(set(rows(*images))) == 1797
    for part in (splits.train, splits.val, splits.test):
        x, labels = part[:]
        assert x.shape[1:] == (64,)
        assert x.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.bincount().min() > 0.09 * len(labels)
    train = images[0]
    varying = train.std(0) > 0
    torch.testing.assert_close(train.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(train[:, varying].std(0, correction=0), torch.ones(int(varying.sum())))
    assert torch.cat(images).abs().max() < 40


def test_digits_cut_does_not_depend_on_the_seed_of_the_order() -> None:
    first, second = DigitsData(seed=0), DigitsData(seed=1)
    assert torch.equal(first.splits.val[:][0], second.splits.val[:][0])
    batch_of = [next(iter(data.train_dataloader()))[0] for data in (first, second)]
    assert not torch.equal(batch_of[0], batch_of[1])


def test_digits_as_images() -> None:
    data = DigitsData(images=True)
    assert next(iter(data.val_dataloader()))[0].shape[1:] == data.input_shape == (1, 8, 8)


def test_fashion_splits_are_disjoint_and_validation_comes_from_train(small_fashion: Path) -> None:
    splits = FashionData(inputs="pixels").splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [200, 5000, 50]
    assert len(set(rows(*(part[:][0] for part in (splits.train, splits.val, splits.test))))) == 5250
    assert splits.val[:][1].bincount().tolist() == [500] * 10


@pytest.mark.parametrize("inputs", ["pca", "pixels", "images"])
def test_fashion_input_forms(small_fashion: Path, inputs: str) -> None:
    data = FashionData(inputs=inputs, num_components=5, limit_train=60, batch_size=16)
    x, labels = next(iter(data.train_dataloader()))
    assert x.shape == (16, *data.input_shape)
    assert x.dtype == torch.float32
    assert labels.shape == (16,)
    assert len(data.splits.train) == 60
    whole = data.splits.train[:][0]
    assert whole.std() == pytest.approx(1.0, abs=0.02)
    assert abs(float(whole.mean())) < 0.01


def test_pca_recovers_the_leading_directions() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x = (rng.normal(size=(4000, 6)) * [9, 5, 2, 1, 1, 1]) @ basis.T + 3.0
    mean, directions = fit_pca(x.astype(np.float32), 3)
    assert mean == pytest.approx(x.mean(axis=0), abs=1e-4)
    assert directions.T @ directions == pytest.approx(np.eye(3), abs=1e-9)
    assert np.abs((directions * basis[:, :3]).sum(axis=0)) == pytest.approx(np.ones(3), abs=0.02)
    assert (directions[np.abs(directions).argmax(axis=0), range(3)] > 0).all()


def test_read_idx_returns_what_was_written(tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "x.gz"
    path.write_bytes(idx_bytes(values))
    assert (read_idx(path) == values).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "expected a gzip file"),
        (
            gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", mtime=0),
            r"beginning 00 00 08.*got 00 00 0d 01",
        ),
        (gzip.compress(b"", mtime=0), "got nothing"),
        (gzip.compress(b"\x00\x00\x08\x03\x00\x00", mtime=0), "announces 3 dimensions in 6 bytes"),
        (
            gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc", mtime=0),
            r"announces \(5,\), that is 5 values, but 3 follow",
        ),
        (idx_bytes(np.zeros((3, 3)))[:-12], "expected a gzip file"),
    ],
)
def test_read_idx_refuses_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        read_idx(path)


def test_fashion_refuses_labels_that_do_not_fit_the_images(small_fashion: Path) -> None:
    (small_fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(49)))
    with pytest.raises(DataFormatError, match=r"got \(50, 28, 28\) and \(49,\)"):
        FashionData().setup("fit")
    (small_fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.full(50, 10)))
    with pytest.raises(DataFormatError, match="expected labels 0 to 9"):
        FashionData().setup("fit")


def test_text_is_cut_90_5_5_and_encoded_by_the_training_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path, "abc" * 300 + "b" * 50 + "cza" * 16 + "bb", monkeypatch)  # 1000 characters
    data = ShakespeareData(context=5, batch_size=4)
    assert data.vocab == ["a", "b", "c"]
    assert data.num_classes == 4
    x, y = data.splits.val[:]
    assert x.shape == y.shape == (9, 5)
    assert decode(x[0], data.vocab) == "bbbbb"
    test_x, _ = data.splits.test[:]
    assert decode(test_x[0], data.vocab) == "c\N{REPLACEMENT CHARACTER}ac\N{REPLACEMENT CHARACTER}"
    assert (test_x == UNKNOWN).any()


def test_text_targets_are_the_next_tokens_and_windows_tile(tmp_path: Path) -> None:
    tokens = torch.arange(23)
    tiled = WindowDataset(tokens, 5, stride=5)
    x, y = tiled[:]
    assert torch.equal(x.flatten(), torch.arange(20))
    assert torch.equal(y, x + 1)
    assert len(WindowDataset(tokens, 5, stride=1)) == 18
    with pytest.raises(DataFormatError, match="5 tokens is too short for context=5"):
        WindowDataset(torch.arange(5), 5, stride=1)


def test_text_epochs_have_the_tokens_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path, "to be or not to be " * 100, monkeypatch)
    data = ShakespeareData(context=8, batch_size=4, tokens_per_epoch=256)
    assert len(data.train_dataloader()) == 8
    assert len(ShakespeareData(context=8, batch_size=4).train_dataloader()) == 54  # 1710 tokens
    x, y = next(iter(data.train_dataloader()))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_encode_and_decode_are_inverse_on_known_characters() -> None:
    assert decode(encode("cab", "abc"), "abc") == "cab"


@pytest.mark.parametrize(
    ("data", "file"),
    [
        (FashionData, "fashion-mnist/train-images-idx3-ubyte.gz"),
        (ShakespeareData, "tinyshakespeare/input.txt"),
    ],
)
def test_missing_data_is_named_with_the_fix(
    data, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    with pytest.raises(
        DataNotFoundError, match=rf"{file}.*ESPER_DATA_DIR is not set.*export ESPER_DATA_DIR="
    ):
        data().setup("fit")
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=rf"{tmp_path}/{file}, but there is none.*github\.com"):
        data().setup("fit")


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ConfigError, match="inputs must be one of"):
        FashionData(inputs="raw")
    with pytest.raises(ConfigError, match=r"num_components must lie in \[1, 784\], got 785"):
        FashionData(num_components=785)
    with pytest.raises(ConfigError, match="limit_train must be at least 1"):
        FashionData(limit_train=0)
    with pytest.raises(ConfigError, match="at least one window of 64, got 10"):
        ShakespeareData(tokens_per_epoch=10)
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        DigitsData(seed=-1)


@needs_data
def test_real_fashion_files_hold_what_they_should() -> None:
    data = FashionData(num_components=8, limit_train=1000)
    assert [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)] == [
        1000,
        5000,
        10000,
    ]
    assert data.splits.test[:][1].bincount().tolist() == [1000] * 10


@needs_data
def test_real_shakespeare_file_holds_what_it_should() -> None:
    data = ShakespeareData()
    assert data.num_classes == 66
    assert decode(data.splits.train[0][0], data.vocab).startswith("First Citizen:\nBefore we proceed")
