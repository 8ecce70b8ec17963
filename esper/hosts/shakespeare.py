"""Tiny Shakespeare, character by character (Karpathy's char-rnn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.errors import ConfigError, DataFormatError
from esper.hosts.datamodule import HostData, Splits
from esper.hosts.files import find_data_file
from esper.hosts.loader import EpochSampler, IndexedDataset

__all__ = ["UNKNOWN", "ShakespeareData", "WindowDataset", "decode", "encode", "vocabulary"]

UNKNOWN = 0
"""Token of every character that the training text lacks."""

_ORIGIN = "https://github.com/karpathy/char-rnn (data/tinyshakespeare/input.txt)"


def vocabulary(text: str) -> list[str]:
    """Return the distinct characters of ``text`` in order; the i-th is token i + 1, token 0 is unknown."""
    return sorted(set(text))


def encode(text: str, vocab: Sequence[str]) -> Tensor:
    """Return the tokens (len(text),) int64; a character outside ``vocab`` becomes :data:`UNKNOWN`."""
    table = {char: token for token, char in enumerate(vocab, start=1)}
    return torch.tensor([table.get(char, UNKNOWN) for char in text], dtype=torch.int64)


def decode(tokens: Tensor, vocab: Sequence[str]) -> str:
    """Return the text of ``tokens`` (T,); an unknown one shows as U+FFFD."""
    return "".join("\N{REPLACEMENT CHARACTER}" if t == UNKNOWN else vocab[t - 1] for t in tokens.tolist())


class WindowDataset(Dataset[tuple[Tensor, ...]]):
    """Windows of a token sequence and the tokens that follow each of their positions.

    Args:
        tokens: (n,) the sequence.
        context: Tokens a window.
        stride: From one window's start to the next; ``context`` makes them tile the text without overlap,
            where a remainder shorter than a window is left out.

    Shape:
        item: inputs and targets, each (context,), or (B, context) for a tensor of B indices.

    Raises:
        DataFormatError: If the sequence is too short for one window.
    """

    def __init__(self, tokens: Tensor, context: int, stride: int) -> None:
        if len(tokens) < context + 1:
            raise DataFormatError(f"a split of {len(tokens)} tokens is too short for context={context}")
        # All windows as a view: nothing is copied until a batch is picked.
        self.windows = tokens.unfold(0, context + 1, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        window = self.windows[index]
        return window[..., :-1], window[..., 1:]


class ShakespeareData(HostData):
    """Next-character prediction; the first 90 % train, the last 10 % are halved into validation and test.

    A training epoch is ``tokens_per_epoch`` tokens in windows that start anywhere, drawn with replacement
    from (seed, epoch). Validation and test read their parts once, window after window.

    Args:
        batch_size: Windows a training step.
        eval_batch_size: Windows a step of validation and test.
        seed: Of the training windows.
        context: Tokens a window.
        tokens_per_epoch: Of training; None for as many as the training part has.

    Shape:
        inputs: (B, context) int64; targets: (B, context) int64, the inputs moved on by one.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        seed: int = 0,
        context: int = 64,
        tokens_per_epoch: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
        if context < 1:
            raise ConfigError(f"ShakespeareData.context must be at least 1, got {context}")
        if tokens_per_epoch is not None and tokens_per_epoch < context:
            raise ConfigError(
                f"ShakespeareData.tokens_per_epoch must be at least one window of {context}, "
                f"got {tokens_per_epoch}"
            )
        self.context = context
        self.tokens_per_epoch = tokens_per_epoch
        self._vocab: list[str] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(context,)."""
        return (self.context,)

    @property
    def vocab(self) -> list[str]:
        """Characters of the training text; reads the file on first use."""
        _ = self.splits
        assert self._vocab is not None
        return self._vocab

    @property
    def num_classes(self) -> int:
        """Tokens: the training text's characters and the unknown one; reads the file on first use."""
        return len(self.vocab) + 1

    def load(self) -> Splits:
        """Read the text, cut it, and encode it with the training part's characters."""
        path = find_data_file("tinyshakespeare/input.txt", origin=_ORIGIN)
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataFormatError(f"expected UTF-8 text at {path}, but {error}; fetch it again") from error
        held_out = len(text) * 9 // 10
        middle = (held_out + len(text)) // 2
        train, val, test = text[:held_out], text[held_out:middle], text[middle:]
        self._vocab = vocabulary(train)
        tokens = [encode(part, self._vocab) for part in (train, val, test)]
        return Splits(
            WindowDataset(tokens[0], self.context, stride=1),
            WindowDataset(tokens[1], self.context, stride=self.context),
            WindowDataset(tokens[2], self.context, stride=self.context),
        )

    def train_sampler(self, train: IndexedDataset) -> EpochSampler:
        """Return windows drawn anywhere in the training text."""
        wanted = self.tokens_per_epoch if self.tokens_per_epoch is not None else len(train) + self.context
        return EpochSampler(
            len(train), seed=self.seed, num_samples=max(1, wanted // self.context), replacement=True
        )
