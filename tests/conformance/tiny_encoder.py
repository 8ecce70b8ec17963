"""A BERT of a few thousand parameters on disk, with a tokenizer and a CLINC150 of made-up words."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = [f"w{i}" for i in range(40)]
NUM_INTENTS = 150
WIDTH = 16


def write_encoder(folder: Path, *, num_layers: int = 2, seed: int = 0) -> Path:
    """Save config.json, model.safetensors and tokenizer.json as Hugging Face does; returns the folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=44, hidden_size=WIDTH, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_clinc(folder: Path, *, train: int = 3, evaluate: int = 1) -> Path:
    """Write clinc150/data_full.json: an intent is told by its first two words; lengths differ."""
    parts = {"train": train, "val": evaluate, "test": evaluate, "oos_train": 0, "oos_val": 0, "oos_test": 0}
    rows: dict[str, list[list[str]]] = {}
    for part, count in parts.items():
        rows[part] = []
        for intent in range(NUM_INTENTS):
            for copy in range(count):
                noise = [WORDS[(7 * intent + copy + k) % 40] for k in range((intent + copy) % 5)]
                words = [WORDS[intent % 40], WORDS[39 - intent // 40], *noise]
                rows[part].append([" ".join(words), f"intent_{intent:03d}"])
    path = folder / "clinc150" / "data_full.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path
