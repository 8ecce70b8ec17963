"""CLINC150: short requests to an assistant, to be told apart by intent (Larson et al., EMNLP 2019, D19-1131)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.errors import ConfigError, DataFormatError, MissingExtraError
from esper.hosts.datamodule import HostData, Splits
from esper.hosts.encoder import PAD
from esper.hosts.files import find_data_file
from esper.hosts.pretrained import MINILM, find_pretrained

__all__ = ["ClincData", "SentenceDataset", "by_length", "few_per_class", "tokenize"]

_ORIGIN = "https://github.com/clinc/oos-eval (data/data_full.json)"
_NUM_INTENTS = 150
_SUBSET_SEED = 0
_PARTS = ("train", "val", "test")


class SentenceDataset(Dataset[tuple[Tensor, ...]]):
    """Tokenised sentences with their labels; a batch is as long as its longest sentence.

    Args:
        ids: (n, T) int64, filled up with :data:`~esper.hosts.encoder.PAD` on the right.
        labels: (n,) int64.

    Shape:
        item: ids (B, t) with t <= T, and labels (B,), for a tensor of B indices.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels = ids, labels
        self._lengths = (ids != PAD).sum(dim=1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        longest = int(self._lengths[index].max())
        return self.ids[index][..., :longest].contiguous(), self.labels[index]


def tokenize(texts: Sequence[str], tokenizer_file: Path, max_length: int) -> Tensor:
    """Return the tokens of ``texts`` (n, max_length) int64, cut and filled up with PAD.

    Args:
        texts: Sentences.
        tokenizer_file: A ``tokenizer.json`` as Hugging Face writes it.
        max_length: Tokens a sentence, its marks of beginning and end included.

    Raises:
        MissingExtraError: The package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(
            "CLINC150 is read with the package tokenizers, which is not installed; run: pip install 'esper[finetune]'"
        ) from error
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=PAD)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=torch.int64)


def few_per_class(labels: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Return the sorted indices of ``count`` samples of every class, the same ones every time."""
    rng = np.random.default_rng(_SUBSET_SEED)
    picked = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(picked))


def by_length(data: SentenceDataset, batch_size: int) -> SentenceDataset:
    """Order ``data`` so that each batch holds sentences of nearly one length, the batches in a fixed mixed order.

    Half of a batch of random sentences would be padding. The mixed order keeps the first batches, which gates
    look at, from being the shortest sentences of the split.
    """
    order = torch.argsort((data.ids != PAD).sum(dim=1), stable=True)
    batches = list(order.split(batch_size))
    if len(batches[-1]) < batch_size:
        rest = [batches.pop()]  # one that is not full has to stay at the end
    else:
        rest = []
    mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(_SUBSET_SEED)).tolist()
    index = torch.cat([batches[i] for i in mixed] + rest)
    return SentenceDataset(data.ids[index], data.labels[index])


class ClincData(HostData):
    """The 150 intents of CLINC150's full set: 100, 20 and 30 sentences each to train, validate and test.

    Requests outside of all intents are left out. Sentences are tokenised once.

    Args:
        batch_size: Sentences a step.
        eval_batch_size: Sentences a step of validation and test.
        seed: Of the training order; which sentences are trained on does not depend on it.
        examples_per_intent: To train on, 1 to 100; None for all.
        max_length: Tokens a sentence at most; longer ones are cut.
        weights: Whose tokenizer: see :class:`~esper.hosts.encoder.EncoderConfig`.

    Shape:
        inputs: (B, t) int64 with t <= max_length; labels: (B,) int64.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        seed: int = 0,
        examples_per_intent: int | None = None,
        max_length: int = 32,
        weights: str = MINILM,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        if examples_per_intent is not None and examples_per_intent < 1:
            raise ConfigError(
                f"ClincData.examples_per_intent must be at least 1 or None, got {examples_per_intent}"
            )
        if max_length < 3:
            raise ConfigError(
                f"ClincData.max_length must be at least 3 (two marks and a word), got {max_length}"
            )
        self.examples_per_intent = examples_per_intent
        self.max_length = max_length
        self.weights = weights

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(max_length,)."""
        return (self.max_length,)

    @property
    def num_classes(self) -> int:
        """Intents."""
        return _NUM_INTENTS

    def load(self) -> Splits:
        """Read the sentences, take the few that are trained on, and tokenise."""
        path = find_data_file("clinc150/data_full.json", origin=_ORIGIN)
        tokenizer = find_pretrained(self.weights, "tokenizer.json")
        parts = _read(path)
        intents = sorted({intent for _, intent in parts["train"]})
        if len(intents) != _NUM_INTENTS:
            raise DataFormatError(
                f"expected {_NUM_INTENTS} intents in {path}, got {len(intents)}; get the full set from {_ORIGIN}"
            )
        number = {intent: i for i, intent in enumerate(intents)}
        made = {}
        for name, rows in parts.items():
            if unknown := sorted({intent for _, intent in rows} - number.keys()):
                raise DataFormatError(f"{path}: {name} has intents that train lacks, such as {unknown[0]!r}")
            labels = np.array([number[intent] for _, intent in rows])
            keep = np.arange(len(labels))
            if name == "train" and self.examples_per_intent is not None:
                keep = few_per_class(labels, self.examples_per_intent)
            ids = tokenize([rows[i][0] for i in keep], tokenizer, self.max_length)
            made[name] = SentenceDataset(ids, torch.from_numpy(labels[keep]))
        return Splits(
            made["train"], by_length(made["val"], self.eval_batch_size), by_length(made["test"], self.eval_batch_size)
        )  # fmt: skip


def _read(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the (text, intent) pairs of the three parts.

    Raises:
        DataFormatError: The file does not hold them.
    """
    try:
        content = json.loads(path.read_bytes())
        return {name: [(str(text), str(intent)) for text, intent in content[name]] for name in _PARTS}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataFormatError(
            f"expected an object with lists {', '.join(_PARTS)} of [text, intent] in {path}, but it cannot be read "
            f"as one ({error!r}); get it from {_ORIGIN}"
        ) from error
